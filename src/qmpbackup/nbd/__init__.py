# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol (NetworkBlockDevice/nbd, doc/proto.md): as a client of QEMU's servers, and as a server of
read-only exports. Knows neither QEMU's monitor nor targets."""
