# SPDX-License-Identifier: Apache-2.0
"""Where restore points live. Knows files and manifests, nothing of QEMU's monitor."""
