"""The profile of the machine onnxcompress is measured on, from measurements that are kept.

    onnxcompress profile fit --name host-x86-vnni --save-results results.json    # on that machine, five minutes
    python hardware_profiles/fitting/host.py results.json                        # keeps them, and writes the profile
    python hardware_profiles/fitting/host.py                                     # fits what is kept again

What is fitted comes from ``measured/host-x86-vnni.json.gz``; what people wrote (description, notes) stays here.
"""

from __future__ import annotations

import dataclasses
import gzip
import sys
from pathlib import Path
from typing import Any

from onnxcompress.fitting.regression import Fitted, fit
from onnxcompress.fitting.samples import Measurements
from onnxcompress.profile_files import write
from onnxcompress.profile_schema import Profile

HERE = Path(__file__).resolve().parent
KEPT = HERE / "measured" / "host-x86-vnni.json.gz"
PROFILE = HERE.parent / "host-x86-vnni.toml"

ISA = ("avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni")
"""What decides which kernels run; the processor has more."""

NOTES = """
A virtual machine: the nominal clock is the time stamp counter's, the boost clock is unknown. Its speed drifts by
up to 8 % from hour to hour, and whole models were timed on another day's state of it as well as on this one's.
held_out_error is of networks made up for this. On 32 forms of 11 real models (float, quantized by onnxruntime, and by
onnxcompress; benchmarks.cost) the error is 7 % (median) and 10 % (mean). No coefficient was fitted to those
models, but which links and networks are measured, and what the cost model tells apart, was extended after seeing
where it was off on them. Known to be too short: models that spend their time in Loops (a body counts once), and
convolutions whose padding is as large as the map.
"""


def complete(fitted: Fitted) -> Profile:
    """The fitted profile with what people know."""
    profile = fitted.profile
    tables: dict[str, Any] = {f.alias or n: getattr(profile, n) for n, f in Profile.model_fields.items()}
    tables["description"] = "x86-64 server core with AVX-512 and VNNI (AMD Zen 5), onnxruntime on one thread"
    tables["device"] = profile.device.model_copy(
        update={"cpu": "AMD EPYC, family 26 (Zen 5)", "isa": ISA, "host": True, "frequency_ghz": 2.6}
    )
    errors = f"median {fitted.median_error:.1%}, mean {fitted.mean_error:.1%} of {len(fitted.checked)}"
    tables["provenance"] = profile.provenance.model_copy(
        update={"notes": NOTES, "held_out": f"{profile.provenance.held_out}: {errors}"}
    )
    return Profile.model_validate(tables)


def main() -> None:
    """Command line."""
    if len(sys.argv) > 1:
        results = Measurements.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"), path=sys.argv[1])
        machine = {k: v for k, v in results.machine.items() if k not in ("system", "load")}
        results = dataclasses.replace(results, machine=machine)
        text = results.to_json().replace("\n", "").replace("  ", "")
        KEPT.write_bytes(gzip.compress(text.encode(), mtime=0))
    kept = Measurements.from_json(gzip.decompress(KEPT.read_bytes()).decode(), path=str(KEPT))
    fitted = fit(kept, name="host-x86-vnni")
    write(complete(fitted), PROFILE)
    print(f"held out: median {fitted.median_error:.1%}, mean {fitted.mean_error:.1%}")


if __name__ == "__main__":
    main()
