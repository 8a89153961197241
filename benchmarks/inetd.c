/*
 * The listener of a server that wants its connection on standard input: one child a connection.
 *
 *   inetd PORT PROGRAM [ARGUMENT...]      loopback only
 *
 * Children are waited for, so that their CPU is added to this process's.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static void reap(int number)
{
	(void)number;
	while (waitpid(-1, NULL, WNOHANG) > 0) {
	}
}

static void serve(int fd, char **program)
{
	if (fork() == 0) {
		dup2(fd, 0);
		dup2(fd, 1);
		dup2(fd, 2);
		execv(program[0], program);
		_exit(127);
	}
	close(fd);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	struct sigaction action = { .sa_handler = reap, .sa_flags = SA_RESTART };
	int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (argc < 3)
		return 2;
	address.sin_port = htons((unsigned short)atoi(argv[1]));
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	sigaction(SIGCHLD, &action, NULL);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 ||
	    listen(listener, 1024) < 0) {
		perror("inetd");
		return 1;
	}
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

		if (fd >= 0)
			serve(fd, argv + 2);
	}
}
