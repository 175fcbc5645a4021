# SPDX-License-Identifier: Apache-2.0
"""Everything that talks to QEMU: monitor, agent, inventory, jobs, block graph, images.

Knows nothing of targets.
"""
