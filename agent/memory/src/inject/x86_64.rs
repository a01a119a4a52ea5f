//! Registers and system calls of x86-64.

use std::io;

use nix::sys::ptrace;
use nix::unistd::Pid;

pub(super) type Registers = libc::user_regs_struct;

/// The instruction `syscall`.
pub(super) const SYSCALL: &[u8] = &[0x0f, 0x05];

/// Calls that end with `EINTR` when they are interrupted, whatever `SA_RESTART` says: waiting for events, semaphores
/// and signals always, sockets when they have a timeout (signal(7)).
pub(super) const ENDS_WITH_EINTR: &[i64] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    IO_PGETEVENTS,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
];

/// `__NR_io_pgetevents`, which the libc crate lacks.
const IO_PGETEVENTS: i64 = 333;

/// `__USER_CS` of 64-bit code.
const CODE_SEGMENT: u64 = 0x33;

pub(super) fn is_native(registers: &Registers) -> bool {
    registers.cs == CODE_SEGMENT
}

pub(super) fn read(thread: Pid) -> io::Result<Registers> {
    Ok(ptrace::getregs(thread)?)
}

pub(super) fn write(thread: Pid, registers: Registers) -> io::Result<()> {
    Ok(ptrace::setregs(thread, registers)?)
}

pub(super) fn with_call(registers: &Registers, instruction: u64, number: i64, argument: u64) -> Registers {
    let mut call = *registers;
    call.rip = instruction;
    call.rax = number.cast_unsigned();
    // No call of the thread's own is under way, which the kernel would begin again.
    call.orig_rax = u64::MAX;
    call.rdi = argument;
    (call.rsi, call.rdx, call.r10, call.r8, call.r9) = (0, 0, 0, 0, 0);
    call
}

pub(super) fn result(registers: &Registers) -> i64 {
    registers.rax.cast_signed()
}

pub(super) fn would_end_with_eintr(registers: &Registers) -> bool {
    registers.rax.cast_signed() == -i64::from(libc::EINTR)
        && ENDS_WITH_EINTR.contains(&registers.orig_rax.cast_signed())
}

/// Back before the instruction, with the call's number where the instruction expects it.
pub(super) fn begin_again(registers: &mut Registers) {
    registers.rax = registers.orig_rax;
    registers.rip -= SYSCALL.len() as u64;
    registers.orig_rax = u64::MAX;
}
