# SPDX-License-Identifier: Apache-2.0
"""What to do, decided purely: levels, bitmap rule, transactions as data, chain rules.

No I/O: everything here is a function from values to values that a test can call.
"""
