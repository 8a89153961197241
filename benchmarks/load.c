/*
 * A load generator for POP3 servers on loopback: one thread, one scenario, one JSON line.
 *
 *   load SCENARIO --port P --user NAME [options]        password in the environment, POP_PASSWORD
 *
 * SCENARIO
 *   session  connect, login, STAT, QUIT, --concurrency at once; users NAME0 ... NAME(users-1)
 *   retr     RETR of all messages over and over, --window in flight
 *   top      TOP n 0, the same way
 *   list     LIST, one after another
 *   uidl     UIDL, the same way
 *   delete   DELE every tenth message; what is timed is QUIT; then STAT of the rest is checked
 *   open     login and STAT, then the first UIDL, while --probe-user sends NOOP at 1 kHz
 *   hold     login, STAT, LIST, UIDL; then it is ready, and does nothing: the server's memory is read
 *   md5      no server: the digest of standard input, to check the one in md5.h
 *
 * RETR and TOP with one in flight spin instead of sleeping: only the server's wake-up is timed.
 *
 * Every answer is checked: status, CRLF line ends, terminator, and that the octets of a message,
 * dot-stuffing undone, are as many as LIST has announced. A wrong answer ends the program with
 * status 1, too slow a server (--limit) with 3.
 *
 * With --sync it writes `ready`, waits for an octet on standard input, works, writes its JSON
 * line, waits for another octet and only then says goodbye: so another program can read the
 * server's clocks at both moments.
 */
#include "client.h"
#include "probe.h"

#include <getopt.h>
#include <sys/epoll.h>

enum { MOST_CONCURRENT = 1024 };

/* ---- Scenarios ---- */

static uint64_t sessions_begun, sessions_ended;
static bool *at_work; /* by user: in a session now */
static int next_user;

static void begin_session(struct connection *c, int queue)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };

	/* In turn, but one session may last longer than all others: none is logged in twice. */
	do {
		c->user = next_user;
		next_user = (next_user + 1) % given.users;
	} while (at_work[c->user]);
	at_work[c->user] = true;
	sessions_begun++;
	dial(c, SMALL_BUFFER, SOCK_NONBLOCK);
	if (epoll_ctl(queue, EPOLL_CTL_ADD, c->fd, &event) < 0)
		die("epoll: %s", strerror(errno));
}

/* An answer has come: send what follows. */
static void next_step(struct connection *c)
{
	char user[128];
	uint64_t count, octets;

	snprintf(user, sizeof user, "%s%d", given.user, c->user);
	switch (c->step++) {
	case 0:
		if (given.apop) {
			c->step = 2;
			send_apop(c, user);
		} else {
			send_user(c, user);
		}
		break;
	case 1:
		command(c, "PASS %s\r\n", given.password);
		break;
	case 2:
		command(c, "STAT\r\n");
		break;
	case 3:
		read_stat(c, &count, &octets);
		command(c, "QUIT\r\n");
		break;
	case 4:
		break;
	default:
		die("an answer to no question: %.100s", c->status);
	}
}

static void sessions(void)
{
	static struct connection slots[MOST_CONCURRENT];
	struct epoll_event events[64];
	int queue = epoll_create1(EPOLL_CLOEXEC), open_slots = given.concurrency;

	if (given.concurrency > MOST_CONCURRENT || given.concurrency > given.users)
		die("--concurrency must not be above --users, nor above %d", MOST_CONCURRENT);
	at_work = calloc((size_t)given.users, sizeof *at_work);
	if (!at_work)
		die("no memory");
	ready();
	for (int i = 0; i < given.concurrency; i++)
		begin_session(&slots[i], queue);
	while (open_slots > 0) {
		int count = epoll_wait(queue, events, 64, -1);

		for (int i = 0; i < count; i++) {
			struct connection *c = events[i].data.ptr;
			bool closed = false;

			if (fill(c, 0, &closed)) {
				while (parse(c, STATUS, 0))
					next_step(c);
				continue;
			}
			if (!closed)
				continue;
			if (c->step != 5)
				die("the server has hung up at step %d", c->step);
			close(c->fd);
			at_work[c->user] = false;
			sessions_ended++;
			if (sessions_begun < given.count && !time_is_over())
				begin_session(c, queue);
			else
				open_slots--;
		}
	}
	result(sessions_ended, 0, now() - started, "");
}

/* Send `count` commands made of `format` and a message-number, at most --window unanswered. */
static void window(struct connection *c, const char *format, enum kind kind, uint64_t every)
{
	uint64_t issued = 0, done = 0, octets = 0, target = given.count;
	uint64_t numbers = message_count / every;
	char *text = malloc((size_t)given.window * 40);
	bool closed;

	if (!text || !numbers)
		die("nothing to do");
	while (done < target) {
		size_t length = 0;

		if (time_is_over())
			target = issued;
		while (issued < target && issued - done < (uint64_t)given.window)
			length += (size_t)snprintf(text + length, 40, format,
			                           issued++ % numbers * every + every);
		if (length)
			send_all(c, text, length);
		while (done < issued && parse(c, kind, done % numbers * every + every - 1)) {
			octets += kind == STATUS ? 0 : c->octets;
			done++;
			/* One at a time means that the next is sent before more is read. */
			if (issued < target && issued - done <= (uint64_t)given.window / 2)
				break;
		}
		if (done < issued && c->start == c->have && !fill(c, 0, &closed))
			die("the server has hung up");
		else if (done < issued && !memchr(c->buffer + c->start, '\n', c->have - c->start) &&
		         !fill(c, 0, &closed))
			die("the server has hung up");
	}
	free(text);
	given.count = done;
	total_octets = kind == STATUS ? total_octets : octets;
}

static void fetch(const char *format, enum kind kind)
{
	struct connection c = { 0 };

	dial(&c, BUFFER, 0);
	login(&c, given.user);
	stat_drop(&c);
	command(&c, "LIST\r\n");
	await(&c, LISTING, 0);
	ready();
	/* One at a time, a sleeping generator's own wake-up would be the larger part of a round. */
	given.spin = given.window == 1;
	window(&c, format, kind, 1);
	given.spin = false;
	result(given.count, total_octets, now() - started, "");
	say_quit(&c);
}

static void rows(const char *text, enum kind kind)
{
	struct connection c = { 0 };
	uint64_t done = 0, octets = 0;

	dial(&c, BUFFER, 0);
	login(&c, given.user);
	stat_drop(&c);
	ready();
	while (done < given.count && !time_is_over()) {
		command(&c, "%s\r\n", text);
		await(&c, kind, 0);
		octets += c.octets;
		done++;
	}
	result(done, octets, now() - started, "");
	if (kind == IDS)
		check_unique();
	say_quit(&c);
}

static void delete_tenth(void)
{
	struct connection c = { 0 };
	uint64_t kept = 0, kept_octets = 0, after, after_octets;

	dial(&c, BUFFER, 0);
	login(&c, given.user);
	stat_drop(&c);
	command(&c, "LIST\r\n");
	await(&c, LISTING, 0);
	for (uint64_t i = 0; i < message_count; i++)
		if ((i + 1) % 10) {
			kept++;
			kept_octets += sizes[i];
		}
	given.count = message_count / 10;
	given.window = 32;
	window(&c, "DELE %" PRIu64 "\r\n", STATUS, 10);
	ready();
	command(&c, "QUIT\r\n");
	await(&c, STATUS, 0);
	result(given.count, total_octets, now() - started, "");
	close(c.fd);
	dial(&c, BUFFER, 0);
	login(&c, given.user);
	command(&c, "STAT\r\n");
	await(&c, STATUS, 0);
	given.messages = 0;
	read_stat(&c, &after, &after_octets);
	if (after != kept || after_octets < kept_octets ||
	    (after_octets > kept_octets && !given.alters))
		die("%" PRIu64 " messages of %" PRIu64 " octets are left, not %" PRIu64 " of %" PRIu64,
		    after, after_octets, kept, kept_octets);
	say_quit(&c);
}

/* An open maildrop of which everything is known, for as long as the other program wants. */
static void hold(void)
{
	struct connection c = { 0 };

	dial(&c, BUFFER, 0);
	login(&c, given.user);
	stat_drop(&c);
	command(&c, "LIST\r\n");
	await(&c, LISTING, 0);
	command(&c, "UIDL\r\n");
	await(&c, IDS, 0);
	check_unique();
	ready();
	result(message_count, total_octets, now() - started, "");
	say_quit(&c);
}

static void print_md5(void)
{
	char text[MD5_LONGEST], digest[33];

	md5_hex(text, fread(text, 1, sizeof text, stdin), digest);
	puts(digest);
}

/* ---- The command line ---- */

static const struct option options[] = {
	{ "port", required_argument, NULL, 'p' },
	{ "user", required_argument, NULL, 'u' },
	{ "probe-user", required_argument, NULL, 'P' },
	{ "suffix", required_argument, NULL, 'S' },     /* behind every user's name at login */
	{ "users", required_argument, NULL, 'n' },      /* session: how many users there are */
	{ "auth", required_argument, NULL, 'a' },       /* apop (default) or pass */
	{ "concurrency", required_argument, NULL, 'c' },
	{ "window", required_argument, NULL, 'w' },     /* commands in flight */
	{ "count", required_argument, NULL, 'N' },      /* sessions, or commands, in all */
	{ "seconds", required_argument, NULL, 's' },    /* begin nothing new after so long */
	{ "limit", required_argument, NULL, 'l' },      /* give up after so long */
	{ "messages", required_argument, NULL, 'm' },   /* what STAT must say */
	{ "alters", no_argument, NULL, 'A' }, /* the server adds header fields to what is left */
	{ "sync", no_argument, NULL, 'y' },
	{ 0 },
};

static void read_options(int argc, char **argv)
{
	int letter;

	while ((letter = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (letter) {
		case 'p': given.port = atoi(optarg); break;
		case 'u': given.user = optarg; break;
		case 'P': given.probe_user = optarg; break;
		case 'S': given.suffix = optarg; break;
		case 'n': given.users = atoi(optarg); break;
		case 'a': given.apop = strcmp(optarg, "pass") != 0; break;
		case 'c': given.concurrency = atoi(optarg); break;
		case 'w': given.window = atoi(optarg); break;
		case 'N': given.count = strtoull(optarg, NULL, 10); break;
		case 's': given.seconds = atof(optarg); break;
		case 'l': given.limit = atoi(optarg); break;
		case 'm': given.messages = strtoull(optarg, NULL, 10); break;
		case 'A': given.alters = true; break;
		case 'y': given.sync = true; break;
		default: exit(2);
		}
	}
}

int main(int argc, char **argv)
{
	read_options(argc, argv);
	const char *scenario = optind < argc ? argv[optind] : "";

	if (strcmp(scenario, "md5") == 0) {
		print_md5();
		return 0;
	}
	given.password = getenv("POP_PASSWORD");
	if (!given.password || !given.user || given.port <= 0 || given.port > 65535 ||
	    given.concurrency < 1 || given.users < 1 || given.window < 1 || given.limit < 1 ||
	    given.count < 1) {
		fputs("load: see the comment at the top of load.c\n", stderr);
		return 2;
	}
	signal(SIGALRM, too_slow);
	alarm((unsigned)given.limit);
	if (strcmp(scenario, "session") == 0)
		sessions();
	else if (strcmp(scenario, "retr") == 0)
		fetch("RETR %" PRIu64 "\r\n", MESSAGE);
	else if (strcmp(scenario, "top") == 0)
		fetch("TOP %" PRIu64 " 0\r\n", HEADER);
	else if (strcmp(scenario, "list") == 0)
		rows("LIST", LISTING);
	else if (strcmp(scenario, "uidl") == 0)
		rows("UIDL", IDS);
	else if (strcmp(scenario, "delete") == 0)
		delete_tenth();
	else if (strcmp(scenario, "open") == 0)
		open_drop();
	else if (strcmp(scenario, "hold") == 0)
		hold();
	else
		die("no such scenario: %s", scenario);
	return 0;
}
