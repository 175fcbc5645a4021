# SPDX-License-Identifier: Apache-2.0
"""The use cases, each readable from top to bottom. The only room that knows QEMU and targets."""
