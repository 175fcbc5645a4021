# SPDX-License-Identifier: Apache-2.0
"""Where points live. What reads points, whichever kind of target holds them, stands on `interface`."""
