# SPDX-License-Identifier: Apache-2.0
"""Which blobs a repository has, and where: index files as JSON, and what is looked up in.

    lookup ──► cache ──► making ──► table          index_file: index files as JSON

Knows nothing of how index files are sealed or stored.
"""
