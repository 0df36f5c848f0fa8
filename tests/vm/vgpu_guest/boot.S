// Multiboot (version 1) header and entry: QEMU's -kernel loads the program at 1 MiB and enters it in
// 32-bit protected mode, flat segments, without paging and without a stack.

  .section .multiboot, "a"
  .balign 4
  .long 0x1badb002
  .long 0
  .long -0x1badb002

  .text
  .global _start
_start:
  cli
  mov $stack_top, %esp
  call Main
1:
  hlt
  jmp 1b

  .bss
  .balign 16
  .skip 16384
stack_top:

  .section .note.GNU-stack, "", @progbits
