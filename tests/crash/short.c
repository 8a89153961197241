/* Writes to files are cut short: at most half of what was asked for is written.
 *
 *     gcc -shared -fPIC -o short.so short.c && LD_PRELOAD=./short.so twistd ...
 *
 * write(2) allows it at any time; disks that become full and signals do it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

static size_t cut(int fd, size_t count)
{
    struct stat found;

    if (count < 2 || fstat(fd, &found) || !S_ISREG(found.st_mode))
        return count;
    return count / 2;
}

ssize_t write(int fd, const void *octets, size_t count)
{
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");

    return real(fd, octets, cut(fd, count));
}

ssize_t pwrite64(int fd, const void *octets, size_t count, off64_t offset)
{
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");

    return real(fd, octets, cut(fd, count), offset);
}
