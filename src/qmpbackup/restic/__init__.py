# SPDX-License-Identifier: Apache-2.0
"""The restic repository format: keys, packs, indexes, trees, snapshots, locks, and where they lie.

Follows restic's own specification (doc/design.rst, version 2 written, 1 and 2 read). Must not know
QEMU, VMs or restore points: it stores and reads blobs, trees and snapshots.
"""
