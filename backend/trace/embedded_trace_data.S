// MVGPU_EMBEDDED_TRACE: path of the trace file, given by CMakeLists.txt.
  .section .rodata
  .balign 16
  .global mvgpu_embedded_trace_begin
  .global mvgpu_embedded_trace_end
mvgpu_embedded_trace_begin:
  .incbin MVGPU_EMBEDDED_TRACE
mvgpu_embedded_trace_end:
  .section .note.GNU-stack, "", %progbits
