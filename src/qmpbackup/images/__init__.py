# SPDX-License-Identifier: Apache-2.0
"""Images as files: qemu-img and qemu-nbd, headers and layout of qcow2, what programs may open, digests.

Knows neither the monitor nor targets.
"""
