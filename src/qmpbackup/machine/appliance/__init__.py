# SPDX-License-Identifier: Apache-2.0
"""A small Linux of our own, in whose kernel file systems of guests are read, and never in this host's.

It has no network and no disk of this host's; what it is given it may write to its overlays alone. Knows
Debian's packages, QEMU and what runs inside; must not know points and targets.
"""
