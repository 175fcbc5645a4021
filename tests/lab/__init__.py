# SPDX-License-Identifier: Apache-2.0
"""The laboratory: real VMs, images and load for the tests.

It knows QEMU and its tools and nothing of the product, whose command line it starts as a user would
(`lab.cli`). So what the product gets wrong cannot go unseen because the test got it wrong too.

What uses the product is in `stock`.

    qmp      a small monitor client          qemu    a QEMU process to test on
    disks    images and their contents       guest   a booted Linux with agent and root shell
    load     writes while backups run        cli     the product's commands
"""
