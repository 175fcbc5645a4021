# SPDX-License-Identifier: Apache-2.0
"""The VM, over QMP: monitor, agent, inventory, views, copies, jobs, recovery, and QEMUs of our own.

Knows nothing of targets, nor what becomes of what it copies.
"""
