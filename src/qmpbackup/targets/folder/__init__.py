# SPDX-License-Identifier: Apache-2.0
"""Points in a folder of qcow2 files."""
