/*
 * kne_confine.h - fewer rights for the process.
 */
#ifndef KNE_CONFINE_H
#define KNE_CONFINE_H

/*
 * Give up for good, in all threads and in whatever they may start: new privileges (set-user-ID programs are ordinary ones),
 * core files (they would hold prompts and weights), and by a filter of system calls what an engine has no use for: starting
 * programs, sockets other than Unix ones, tracing other processes, io_uring, mounts, namespaces, kernel modules. A refused call fails
 * with EPERM (clone3 with ENOSYS). Call it once the device is open, for a driver may need some of that.
 *
 * Returns what could not be given up, as a text for the log; NULL: nothing.
 */
const char *kne_confine(void);

#endif
