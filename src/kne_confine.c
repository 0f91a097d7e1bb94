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

/* Younger than the headers of some systems; from 424 on a call has one number everywhere. */
#define IO_URING_SETUP 425
#define OPEN_TREE 428
#define MOVE_MOUNT 429
#define FSOPEN 430
#define FSPICK 433
#define CLONE3 435
#define PIDFD_GETFD 438
#define MOUNT_SETATTR 442

#define NAMESPACES 0x7e020000 /* CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET */

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define REFUSE BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define UNLESS(value) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, 1)
#define NUMBER(number) UNLESS(number), REFUSE
#define NO(name) NUMBER(__NR_##name)

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
    NUMBER(OPEN_TREE),
    NUMBER(MOVE_MOUNT),
    NUMBER(FSOPEN),
    NUMBER(FSPICK),
    NUMBER(MOUNT_SETATTR),
    NO(setns),
    NO(unshare),
    NO(bpf),
    NO(perf_event_open),
    NO(init_module),
    NO(finit_module),
    NO(delete_module),
    NO(kexec_load),
    NO(kexec_file_load),
    NO(keyctl),
    NO(add_key),
    NO(request_key),
    NO(process_vm_readv),
    NO(process_vm_writev),
    NUMBER(PIDFD_GETFD),
    NUMBER(IO_URING_SETUP), /* it opens sockets too, past this filter */
#ifndef __SANITIZE_ADDRESS__ /* whose search for leaks traces the process itself */
    NO(ptrace),
#endif
    /* No namespaces by clone(). What clone3() is asked for cannot be seen here: without it a C library takes clone(). */
    UNLESS(CLONE3),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_clone, 0, 4),
    LOAD(args[0]),
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, NAMESPACES, 0, 1),
    REFUSE,
    ALLOW,
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
