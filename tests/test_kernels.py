"""Kernels of a compiled program, counted in a text small enough to count by hand."""

from rpt_jax.planning.kernels import read_kernels

TEXT = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused_write (cache: bf16[8,64], new: bf16[8,1], at: s32[]) -> bf16[8,64] {
  %cache = bf16[8,64]{1,0} parameter(0)
  %new = bf16[8,1]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %update = bf16[8,64]{1,0} dynamic-update-slice(%cache, %new, %zero, %at)
  ROOT %named = bf16[8,64]{1,0} bitcast(%update)
}

%fused_pair (x: f32[16]) -> (f32[16], f32[]) {
  %x = f32[16]{0} parameter(0)
  %doubled = f32[16]{0} add(%x, %x)
  %none = f32[] constant(0)
  %total = f32[] reduce(%doubled, %none), dimensions={0}, to_apply=%sum
  ROOT %both = (f32[16]{0}, f32[]) tuple(%doubled, %total)
}

%body (state: (s32[], bf16[8,64], f32[16], pred[])) -> (s32[], bf16[8,64], f32[16], pred[]) {
  %state = (s32[], bf16[8,64], f32[16], pred[]) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %old = bf16[8,64]{1,0} get-tuple-element(%state), index=1
  %row = f32[16]{0} get-tuple-element(%state), index=2
  %key = bf16[8,1]{1,0} custom-call(%row), custom_call_target="gemm", metadata={op_name="jit(step)/project"}
  %written = bf16[8,64]{1,0} fusion(%old, %key, %step), calls=%fused_write, metadata={op_name="attention"}
  %a = (f32[16], bf16[8,64]) custom-call(), output_to_operand_aliasing={{1}: (0, {})}, metadata={op_name="attention"}
  %copied = f32[16]{0} copy(%row)
  %pair = (f32[16]{0}, f32[]) fusion(%copied), kind=kInput, calls=%fused_pair
  %next = f32[16]{0} get-tuple-element(%pair), index=0
  ROOT %new_state = (s32[], bf16[8,64], f32[16], pred[]) tuple(%step, %written, %next, %done)
}

%condition (state.1: (s32[], bf16[8,64], f32[16], pred[])) -> pred[] {
  %state.1 = (s32[], bf16[8,64], f32[16], pred[]) parameter(0)
  ROOT %go = pred[] get-tuple-element(%state.1), index=3
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %start = ((f32[16]{0}), f32[16]{0}, u32[]) copy-start(%p)
  %moved = f32[16]{0} copy-done(%start)
  %looped = (s32[], bf16[8,64], f32[16], pred[]) while(%moved), condition=%condition, body=%body
  ROOT %result = f32[16]{0} get-tuple-element(%looped), index=2
}
"""


def test_kernels_of_a_loop_and_of_a_run():
    run, token = read_kernels(TEXT, unknown_trips=10)
    # gemm 8 x 2 bytes; write: one column of the cache; attention: 64 bytes and an array that it updates in place; copy
    # 64; pair 64 + 4.
    assert token.count == 5
    assert token.written == 16 + 16 + 64 + 64 + 68
    assert token.by_attention == 16 + 64
    assert token.largest_copy == 64
    # The entry computation adds one copy.
    assert run.count == 10 * 5 + 1 and run.written == 10 * token.written + 64
    assert run.by_attention == 10 * token.by_attention and run.largest_copy == 64


def test_a_program_without_a_loop():
    run, token = read_kernels(TEXT.replace(" while(", " custom-call("), unknown_trips=10)
    assert token is None and run.count == 2
