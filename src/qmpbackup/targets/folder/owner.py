# SPDX-License-Identifier: Apache-2.0
"""Whose a folder is: `vm.json`, with the id of the target and the VM that it belongs to."""

import json
from dataclasses import dataclass, replace

from qmpbackup.errors import UsageError
from qmpbackup.model import VmIdentity
from qmpbackup.plan.names import TARGET_ID
from qmpbackup.targets import manifest
from qmpbackup.targets.inventory import describe, same_vm
from qmpbackup.targets.members import SCHEMA, ObjectReader, parse_object


@dataclass(frozen=True, slots=True)
class Owner:
    """The contents of `vm.json`: the id of the target, and the VM it belongs to."""

    id: str
    vm: VmIdentity

    def encode(self) -> bytes:
        """As it is written."""
        content = {
            "schema": SCHEMA,
            "id": self.id,
            "vm": manifest.identity_to_json(self.vm),
        }
        return (json.dumps(content, indent=1) + "\n").encode("ascii")

    @classmethod
    def decode(cls, data: bytes, name: str) -> "Owner":
        """Parse.

        Raises:
            DamagedError: it is not what the schema says.
            StorageError: a newer version of qmpbackup wrote it.
        """
        reader = ObjectReader(parse_object(data, name), name)
        reader.schema()
        owner = cls(reader.matching("id", TARGET_ID), reader.member("vm", manifest.read_identity))
        reader.end()
        return owner


def of_another(where: str, owner: VmIdentity, identity: VmIdentity) -> UsageError:
    """The error for a VM to which a target does not belong."""
    hint = "Use one folder for each VM."
    if same_vm(replace(owner, host=""), identity):
        hint = (
            "Use one folder for each VM. If it is the same one, whose host was renamed or which was "
            f"moved: --host {owner.host}; a VM with a UUID (-uuid) is known by that on every host."
        )
    return UsageError(
        f"The target {where} belongs to another VM ({describe(owner)}; this one is "
        f"{describe(identity)}).",
        hint,
    )
