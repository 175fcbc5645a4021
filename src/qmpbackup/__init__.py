# SPDX-License-Identifier: Apache-2.0
"""Live full and incremental backups of running QEMU virtual machines."""

__version__ = "0.1.0"
