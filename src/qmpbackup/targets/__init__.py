# SPDX-License-Identifier: Apache-2.0
"""Where points live: manifests, and a package for each kind of target.

What reads points, whichever kind holds them, stands on `interface`. Knows nothing of the monitor.
"""
