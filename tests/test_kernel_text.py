"""Cycles of a kernel from the schedule that libtpu prints."""

from magnet_jax.hlo_text import cost
from magnet_jax.kernel_text import cycles, kernel_cycles

# Four bundles around a loop of 10 steps, which has 3 of its own, and two loops of 4 and 5 steps with two bundles each.
SCHEDULE = """
= control target key start
LB: loop body
     0   :  { %7 = vsyncpa [#allocation5], 0 }
   0x1   :  { %9 = vsyncpa [#allocation5 + $0x1], 0 }
   0x2 LB: > { %s1 = sadd.s32 1, %s2 }
   0x3 LB: > > { %v1 = vld [vmem:[%s3]]  ;;  %p3 = scmp.ge.s32.totalorder %s4, 4 /* loop exit test */ }
   0x4   : > > { %15 = sbr.rel (!%p3) target = $region72 }
   0x5 LB: > > { %v1 = vld [vmem:[%s3]] }
0x6   : > > { %p3 = scmp.ge.s32.totalorder %s4, 5 /* loop exit test */  ;;  %15 = sbr.rel (!%p3) target = $region72 }
   0x7 PF: > { %p13 = scmp.ge.s32.totalorder %s1, 10 /* loop exit test */ }
   0x8   : > {} /* End region */
   0x9   :  { %40 = vsyncpa [#allocation14], 1 }
   0xa   :  { %41 = vsyncpa [#allocation14], 1 }
""".splitlines()

HLO = """HloModule m, is_scheduled=true
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %kernel.1 = f32[8]{0} custom-call(%x), KERNEL{"body":"AAA"}}
  %kernel.2 = f32[8]{0} custom-call(%kernel.1), KERNEL{"body":"AAA"}}
  ROOT %other.3 = f32[8]{0} custom-call(%kernel.2), KERNEL{"body":"BBB"}}
}
""".replace("KERNEL", 'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":')


def test_loops_count_as_often_as_they_run():
    assert cycles(SCHEDULE) == 4 + 10 * (3 + 4 * 2 + 5 * 2)
    assert cycles([]) == 0


def test_equal_kernels_are_printed_once(tmp_path):
    (tmp_path / "1795-kernel.2-00-final_bundles.txt").write_text("\n".join(SCHEDULE))
    (tmp_path / "1795-fusion.7-00-final_bundles.txt").write_text("\n".join(SCHEDULE))
    (tmp_path / "1795-other.3-00-schedule-analysis_final_bundles.txt").write_text("\n".join(SCHEDULE))
    assert kernel_cycles(HLO, tmp_path) == {"kernel.1": 214, "kernel.2": 214}


def test_a_program_costs_what_its_kernels_cost():
    found = cost(HLO, {"kernel.1": 214, "kernel.2": 214})
    assert found.cycles == {"kernel.1": 214, "kernel.2": 214}
    assert found.silent_bytes == {"other.3": 64}
