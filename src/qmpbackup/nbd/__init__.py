# SPDX-License-Identifier: Apache-2.0
"""The NBD protocol (NetworkBlockDevice/nbd, doc/proto.md), on the side of a server. Knows neither QEMU
nor targets."""
