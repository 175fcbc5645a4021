# SPDX-License-Identifier: Apache-2.0
"""What tests take from the shelf and that is made with the product itself: points without a VM, cheap
repositories, runs that can be killed anywhere. What knows nothing of the product is in `lab`.

    stored, stored_repository    points that no VM was needed for
    repositories                 repositories, made cheaply
    scene, repository_world      a VM and a target where runs are broken
    pulling, doomed              parts of a run, to be stopped and killed
    remembered, faulty           storages in memory
    vm_in_memory                 a VM in memory, as a source of runs
    indexes, parsers             index files that are made up; the options that there are
"""
