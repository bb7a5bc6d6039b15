"""Commands about this installation: targets, passes, doctor."""

from __future__ import annotations

from compress.commands import options
from compress.commands.app import command, print_json


@command("targets", "compress targets", "compress targets --devices", "compress targets --json")
def targets(devices: options.DeviceSheets = False, as_json: options.Json = False) -> None:
    """List the targets and whether they work here.

    With --devices, the sheets of phones and boards that --device of `run` takes.
    """
    from compress import doctor, render
    from compress.device_sheets import SHEETS

    rows = [device.to_dict() for device in SHEETS] if devices else doctor.targets()
    if as_json:
        print_json(rows)
    elif devices:
        render.device_sheets(rows)
    else:
        render.targets(rows)


@command("passes", "compress passes", "compress passes --json")
def passes(as_json: options.Json = False) -> None:
    """List the passes with their stage and their options."""
    from compress import doctor, render

    rows = doctor.passes()
    if as_json:
        print_json(rows)
    else:
        render.passes(rows)


@command("doctor", "compress doctor", "compress doctor --json > machine.json")
def doctor(as_json: options.Json = False) -> None:
    """Say what this machine can do and what is missing."""
    from compress import doctor as examination
    from compress import render

    facts = examination.examine()
    if as_json:
        print_json(facts)
    else:
        render.doctor(facts)
