# SPDX-License-Identifier: Apache-2.0
"""Points in a restic repository."""
