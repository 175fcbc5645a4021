# SPDX-License-Identifier: Apache-2.0
"""Where the files of a repository lie: one small interface, its backends and its wrappers."""
