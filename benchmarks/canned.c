/*
 * A POP3 "server" without mailboxes: every answer is made before the first question.
 *
 *   canned PORT MESSAGES OCTETS      OCTETS of each message as sent; the name `s...` has 10
 *
 * It shows what the load generator can drive and what the kernel's loopback costs; it is no peer.
 * Loopback only, one thread, any name and password are good.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { SMALL = 10, INPUT = 8192 };

struct answer {
	char *text;
	size_t length;
};

struct connection {
	int fd;
	bool small, closing;
	size_t have;
	const char *rest; /* of the answer that the socket has not taken yet */
	size_t rest_length;
	char input[INPUT];
};

static struct answer greeting, fine, stat_all, stat_small, list, ids, message, header;
static long messages, octets;

static struct answer make(const char *text)
{
	struct answer made = { strdup(text), strlen(text) };

	return made;
}

static void build(void)
{
	static const char head[] = "Message-ID: <1@example.org>\r\nSubject: canned\r\n\r\n";
	char line[100];
	size_t room = (size_t)messages * 40 + 100, size = (size_t)octets;

	greeting = make("+OK canned <1.1@example.org>\r\n");
	fine = make("+OK\r\n");
	snprintf(line, sizeof line, "+OK %ld %ld\r\n", messages, messages * octets);
	stat_all = make(line);
	snprintf(line, sizeof line, "+OK %d %ld\r\n", SMALL, SMALL * octets);
	stat_small = make(line);
	list.text = malloc(room);
	ids.text = malloc(room);
	message.text = malloc(size + 100);
	header.text = malloc(sizeof head + 100);
	if (!list.text || !ids.text || !message.text || !header.text)
		exit(1);
	list.length = (size_t)sprintf(list.text, "+OK\r\n");
	ids.length = (size_t)sprintf(ids.text, "+OK\r\n");
	for (long i = 1; i <= messages; i++) {
		list.length += (size_t)sprintf(list.text + list.length, "%ld %ld\r\n", i, octets);
		ids.length += (size_t)sprintf(ids.text + ids.length, "%ld id%020ld\r\n", i, i);
	}
	list.length += (size_t)sprintf(list.text + list.length, ".\r\n");
	ids.length += (size_t)sprintf(ids.text + ids.length, ".\r\n");
	header.length = (size_t)sprintf(header.text, "+OK\r\n%s.\r\n", head);
	message.length = (size_t)sprintf(message.text, "+OK\r\n%s", head);
	while (message.length < size + 5) {
		size_t left = size + 5 - message.length, length = left < 160 ? left : 78;

		memset(message.text + message.length, 'x', length - 2);
		memcpy(message.text + message.length + length - 2, "\r\n", 2);
		message.length += length;
	}
	memcpy(message.text + message.length, ".\r\n", 3);
	message.length += 3;
}

static const struct answer *answer_to(struct connection *c, const char *line)
{
	if (strncasecmp(line, "RETR", 4) == 0)
		return &message;
	if (strncasecmp(line, "TOP", 3) == 0)
		return &header;
	if (strncasecmp(line, "STAT", 4) == 0)
		return c->small ? &stat_small : &stat_all;
	if (strncasecmp(line, "LIST", 4) == 0)
		return &list;
	if (strncasecmp(line, "UIDL", 4) == 0)
		return &ids;
	if (strncasecmp(line, "APOP s", 6) == 0 || strncasecmp(line, "USER s", 6) == 0)
		c->small = true;
	if (strncasecmp(line, "QUIT", 4) == 0)
		c->closing = true;
	return &fine;
}

/* Whether all has gone out. */
static bool flush(struct connection *c)
{
	while (c->rest_length) {
		ssize_t sent = send(c->fd, c->rest, c->rest_length, MSG_NOSIGNAL);

		if (sent < 0) {
			if (errno != EAGAIN)
				c->closing = true;
			return false;
		}
		c->rest += sent;
		c->rest_length -= (size_t)sent;
	}
	return true;
}

/* Answer the commands that have come; stop where the socket takes no more. */
static void work(struct connection *c, int queue)
{
	size_t start = 0;
	char *end;
	bool all = flush(c);

	while (all && (end = memchr(c->input + start, '\n', c->have - start))) {
		const struct answer *answer = answer_to(c, c->input + start);

		start = (size_t)(end + 1 - c->input);
		c->rest = answer->text;
		c->rest_length = answer->length;
		all = flush(c);
	}
	memmove(c->input, c->input + start, c->have - start);
	c->have -= start;
	struct epoll_event event = { .events = all ? EPOLLIN : EPOLLOUT, .data.ptr = c };

	if (c->closing) {
		close(c->fd);
		free(c);
	} else {
		epoll_ctl(queue, EPOLL_CTL_MOD, c->fd, &event);
	}
}

static void admit(int listener, int queue)
{
	int one = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
	struct connection *c = fd < 0 ? NULL : calloc(1, sizeof *c);

	if (!c)
		return;
	c->fd = fd;
	c->rest = greeting.text;
	c->rest_length = greeting.length;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };

	epoll_ctl(queue, EPOLL_CTL_ADD, fd, &event);
	work(c, queue);
}

static void receive(struct connection *c, int queue, unsigned what)
{
	if (what & EPOLLIN) {
		ssize_t got = recv(c->fd, c->input + c->have, INPUT - c->have, 0);

		if (got > 0)
			c->have += (size_t)got;
		else if (got == 0 || errno != EAGAIN)
			c->closing = true;
	} else if (what & (EPOLLERR | EPOLLHUP)) {
		c->closing = true;
	}
	work(c, queue);
}

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	int one = 1, queue = epoll_create1(EPOLL_CLOEXEC);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	struct epoll_event events[64], event = { .events = EPOLLIN, .data.ptr = NULL };

	if (argc != 4 || (messages = atol(argv[2])) < 1 || (octets = atol(argv[3])) < 300)
		return 2;
	build();
	address.sin_port = htons((unsigned short)atoi(argv[1]));
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 ||
	    listen(listener, 1024) < 0) {
		perror("canned");
		return 1;
	}
	epoll_ctl(queue, EPOLL_CTL_ADD, listener, &event);
	for (;;) {
		int count = epoll_wait(queue, events, 64, -1);

		for (int i = 0; i < count; i++) {
			if (events[i].data.ptr)
				receive(events[i].data.ptr, queue, events[i].events);
			else
				admit(listener, queue);
		}
	}
}
