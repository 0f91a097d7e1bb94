/*
 * kne_confine.c - fewer rights for the process, see kne_confine.h.
 *
 * The filter names what is refused, not what is allowed: a C library, a driver or a kernel may do the allowed things in new ways,
 * and an engine that a new library kills is worth less than one with a shorter list. Source: seccomp(2), and
 * Documentation/userspace-api/seccomp_filter.rst of Linux.
 */
#include "kne_confine.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#endif

#ifdef ARCH

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define REFUSE BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define UNLESS(value) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, 1)
#define NO(name) UNLESS(__NR_##name), REFUSE

static const struct sock_filter filter[] = {
    /* The numbers below are of this architecture; calls of another one are refused whole. */
    LOAD(arch),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0),
    REFUSE,
    LOAD(nr),
#ifdef __x86_64__
    BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000, 0, 1), /* x32 */
    REFUSE,
#endif
    NO(execve),
    NO(execveat),
    NO(mount),
    NO(umount2),
    NO(pivot_root),
    NO(chroot),
    NO(setns),
    NO(unshare),
    NO(bpf),
    NO(perf_event_open),
    NO(init_module),
    NO(finit_module),
    NO(delete_module),
    NO(kexec_load),
    NO(keyctl),
    NO(add_key),
    NO(request_key),
    NO(process_vm_readv),
    NO(process_vm_writev),
#ifndef __SANITIZE_ADDRESS__ /* whose search for leaks traces the process itself */
    NO(ptrace),
#endif
    /* socket(AF_UNIX, ...) and no other */
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_socket, 0, 3),
    LOAD(args[0]), /* the low half: both architectures are little-endian */
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AF_UNIX, 1, 0),
    REFUSE,
    ALLOW,
};

static int
filter_calls(void)
{
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter,
                                 .filter = (struct sock_filter *) filter};

    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0;
}

#else

static int
filter_calls(void)
{
    return 1;
}

#endif

const char *
kne_confine(void)
{
    struct rlimit none = {0, 0};

    if (setrlimit(RLIMIT_CORE, &none) != 0)
        return "core files could not be switched off";
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return "new privileges could not be given up";
    return filter_calls() ? "this system filters no system calls" : NULL;
}
