/* The generator's side of POP3: connections, commands, and answers that are checked octet by octet. */
#ifndef BENCHMARKS_CLIENT_H
#define BENCHMARKS_CLIENT_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "md5.h"

enum {
	BUFFER = 512 * 1024, /* of one connection that fetches; a line has to fit in */
	SMALL_BUFFER = 16 * 1024,
	LONGEST_STATUS = 512, /* a status line with its CRLF (RFC 2449 section 4) */
};

enum kind { STATUS, MESSAGE, HEADER, LISTING, IDS };

struct connection {
	int fd;
	char *buffer;
	size_t room, start, have; /* octets start ... have are unread */
	bool in_body, last_empty;
	uint64_t octets, rows, lines;
	char status[LONGEST_STATUS + 1]; /* the last status line, without its CRLF */
	int step, user;
};

static struct {
	const char *user, *probe_user, *password, *suffix;
	int port, users, concurrency, window, limit;
	uint64_t count, messages;
	double seconds;
	bool apop, sync, spin, alters;
} given = { .suffix = "", .users = 1, .concurrency = 1, .window = 1, .limit = 120, .count = 1, .apop = true };

/* What LIST said: sizes in octets as sent, of message i + 1; and hashes of unique-ids. */
static uint32_t *sizes;
static uint64_t *ids, message_count, total_octets;

static void die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("load: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	exit(1);
}

static void too_slow(int signal_number)
{
	static const char text[] = "load: no end within --limit seconds\n";

	(void)signal_number;
	if (write(2, text, sizeof text - 1) < 0) {
	}
	_exit(3);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double own_cpu(void)
{
	struct rusage used;

	getrusage(RUSAGE_SELF, &used);
	return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
	       (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
}

/* ---- Reading and checking answers ---- */

static uint64_t number(char **text)
{
	char *end;
	uint64_t value = strtoull(*text, &end, 10);

	if (end == *text)
		die("a number was expected, not: %.60s", *text);
	*text = end;
	return value;
}

static void take_row(struct connection *c, enum kind kind, char *line, size_t length)
{
	char *rest = line;
	uint64_t index = c->rows++;

	line[length - 2] = 0;
	if (c->rows > message_count)
		die("more rows than STAT's %" PRIu64 " messages", message_count);
	if (number(&rest) != index + 1 || *rest++ != ' ')
		die("row %" PRIu64 " is wrong: %.60s", index + 1, line);
	if (kind == LISTING) {
		uint64_t size = number(&rest);

		if (sizes[index] && sizes[index] != size)
			die("the size of message %" PRIu64 " has changed", index + 1);
		sizes[index] = (uint32_t)size;
		c->octets += size;
		return;
	}
	size_t letters = strlen(rest);
	uint64_t hash = 1469598103934665603u; /* FNV-1a: only to find two equal ids */

	if (letters < 1 || letters > 70)
		die("unique-id of %zu characters", letters);
	for (; *rest; rest++) {
		if (*rest < 0x21 || *rest > 0x7e)
			die("unique-id with octet %d", *rest);
		hash = (hash ^ (unsigned char)*rest) * 1099511628211u;
	}
	ids[index] = hash;
}

static int by_value(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return (a > b) - (a < b);
}

static void check_unique(void)
{
	qsort(ids, message_count, sizeof *ids, by_value);
	for (uint64_t i = 1; i < message_count; i++)
		if (ids[i] == ids[i - 1])
			die("two messages have one unique-id");
}

/* The end of a multi-line answer about message `index` (0-based). */
static void check_body(struct connection *c, enum kind kind, uint64_t index)
{
	switch (kind) {
	case MESSAGE:
		if (c->octets != sizes[index])
			die("message %" PRIu64 ": LIST said %" PRIu32 " octets, %" PRIu64 " came",
			    index + 1, sizes[index], c->octets);
		break;
	case HEADER: /* TOP n 0: the header, the empty line, no more */
		if (!c->last_empty || c->lines < 2 || c->octets > sizes[index])
			die("TOP %" PRIu64 " 0: not a header and one empty line", index + 1);
		break;
	default:
		if (c->rows != message_count)
			die("%" PRIu64 " rows, STAT said %" PRIu64, c->rows, message_count);
		if (kind == LISTING && c->octets != total_octets)
			die("LIST adds up to %" PRIu64 " octets, STAT said %" PRIu64, c->octets,
			    total_octets);
	}
}

static void take_status(struct connection *c, const char *line, size_t length)
{
	if (length > LONGEST_STATUS || length < 5)
		die("a status line of %zu octets", length);
	memcpy(c->status, line, length - 2);
	c->status[length - 2] = 0;
	if (strncmp(c->status, "+OK", 3) != 0)
		die("the server says: %.100s", c->status);
}

/* Whether the answer to a command of `kind` about message `index` (0-based) is there whole. */
static bool parse(struct connection *c, enum kind kind, uint64_t index)
{
	char *end;

	while ((end = memchr(c->buffer + c->start, '\n', c->have - c->start))) {
		char *line = c->buffer + c->start;
		size_t length = (size_t)(end - line) + 1;

		c->start += length;
		if (length < 2 || end[-1] != '\r')
			die("a line that does not end in CRLF");
		if (!c->in_body) {
			take_status(c, line, length);
			if (kind == STATUS)
				return true;
			c->in_body = true;
			c->last_empty = false;
			c->octets = c->rows = c->lines = 0;
			continue;
		}
		if (line[0] == '.') {
			if (length == 3) {
				c->in_body = false;
				check_body(c, kind, index);
				return true;
			}
			if (line[1] != '.')
				die("a line begins with one dot");
			length--;
		}
		if (kind == LISTING || kind == IDS) {
			take_row(c, kind, line, length);
			continue;
		}
		if (kind == HEADER && c->last_empty)
			die("TOP %" PRIu64 " 0 goes on behind the empty line", index + 1);
		c->lines++;
		c->octets += length;
		c->last_empty = length == 2;
	}
	return false;
}

/* Read what there is. False: nothing now (only without blocking), or the server has hung up. */
static bool fill(struct connection *c, int flags, bool *closed)
{
	if (c->start == c->have)
		c->start = c->have = 0;
	if (c->start > c->room / 2) {
		memmove(c->buffer, c->buffer + c->start, c->have - c->start);
		c->have -= c->start;
		c->start = 0;
	}
	if (c->have == c->room)
		die("a line is longer than %zu octets", c->room / 2);
	ssize_t got;

	do
		got = recv(c->fd, c->buffer + c->have, c->room - c->have,
		           given.spin ? MSG_DONTWAIT : flags);
	while (given.spin && got < 0 && errno == EAGAIN);
	if (got < 0 && errno == EAGAIN)
		return false;
	if (got < 0)
		die("reading: %s", strerror(errno));
	*closed = got == 0;
	c->have += (size_t)got;
	return got > 0;
}

static void await(struct connection *c, enum kind kind, uint64_t index)
{
	bool closed;

	while (!parse(c, kind, index))
		if (!fill(c, 0, &closed))
			die("the server has hung up");
}

/* ---- Writing commands ---- */

static void send_all(struct connection *c, const char *text, size_t length)
{
	/* Commands are short and few: the socket's buffer takes them, or something is wrong. */
	if (send(c->fd, text, length, MSG_NOSIGNAL) != (ssize_t)length)
		die("writing: %s", strerror(errno));
}

__attribute__((format(printf, 2, 3))) static void command(struct connection *c,
                                                          const char *format, ...)
{
	char text[600];
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	if (length < 0 || (size_t)length >= sizeof text)
		die("a command is too long");
	send_all(c, text, (size_t)length);
}

static void dial(struct connection *c, size_t room, int flags)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)given.port) };
	int one = 1;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
	if (c->fd < 0)
		die("socket: %s", strerror(errno));
	setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
		die("connecting: %s", strerror(errno));
	if (!c->buffer) {
		c->room = room;
		c->buffer = malloc(room);
	}
	if (!c->buffer)
		die("no memory");
	c->start = c->have = 0;
	c->in_body = false;
	c->step = 0;
}

static void send_apop(struct connection *c, const char *user)
{
	char text[MD5_LONGEST + 1], digest[33];
	const char *from = strchr(c->status, '<'), *to = from ? strchr(from, '>') : NULL;

	if (!to)
		die("no APOP challenge in the greeting: %.100s", c->status);
	int length = snprintf(text, sizeof text, "%.*s%s", (int)(to - from) + 1, from, given.password);
	if (length < 0 || (size_t)length >= sizeof text)
		die("the password is too long");
	md5_hex(text, (size_t)length, digest);
	command(c, "APOP %s%s %s\r\n", user, given.suffix, digest);
}

static void send_user(struct connection *c, const char *user)
{
	command(c, "USER %s%s\r\n", user, given.suffix);
}

/* From the greeting to the answer of the login, one command at a time. */
static void login(struct connection *c, const char *user)
{
	await(c, STATUS, 0);
	if (given.apop) {
		send_apop(c, user);
	} else {
		send_user(c, user);
		await(c, STATUS, 0);
		command(c, "PASS %s\r\n", given.password);
	}
	await(c, STATUS, 0);
}

static void read_stat(struct connection *c, uint64_t *count, uint64_t *octets)
{
	char *rest = c->status + 3;

	*count = number(&rest);
	*octets = number(&rest);
	if (given.messages && *count != given.messages)
		die("STAT says %" PRIu64 " messages, not %" PRIu64, *count, given.messages);
}

static void stat_drop(struct connection *c)
{
	command(c, "STAT\r\n");
	await(c, STATUS, 0);
	read_stat(c, &message_count, &total_octets);
	free(sizes);
	free(ids);
	sizes = calloc(message_count + 1, sizeof *sizes);
	ids = calloc(message_count + 1, sizeof *ids);
	if (!sizes || !ids)
		die("no memory");
}

static void say_quit(struct connection *c)
{
	bool closed;

	command(c, "QUIT\r\n");
	await(c, STATUS, 0);
	if (fill(c, 0, &closed))
		die("octets behind the answer to QUIT");
	close(c->fd);
}

/* ---- Both sides of what is timed ---- */

static double started, started_cpu;

static void barrier(void)
{
	char octet;

	fflush(stdout);
	if (given.sync && read(0, &octet, 1) != 1)
		die("standard input has ended");
}

static void ready(void)
{
	if (given.sync)
		puts("ready");
	barrier();
	started = now();
	started_cpu = own_cpu();
}

static bool time_is_over(void)
{
	return given.seconds > 0 && now() - started >= given.seconds;
}

/* `more` is further JSON members, beginning with a comma, or nothing. */
static void result(uint64_t count, uint64_t octets, double seconds, const char *more)
{
	printf("{\"count\": %" PRIu64 ", \"octets\": %" PRIu64 ", \"seconds\": %.6f, "
	       "\"own_cpu\": %.6f%s}\n",
	       count, octets, seconds, own_cpu() - started_cpu, more);
	barrier();
}

#endif
