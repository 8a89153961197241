/* How late other sessions are answered while one opens a large maildrop. */
#ifndef BENCHMARKS_PROBE_H
#define BENCHMARKS_PROBE_H

#include "client.h"

#include <poll.h>

enum { MOST_PROBES = 1 << 20 };

static struct {
	struct connection c;
	double next, due[MOST_PROBES], late[MOST_PROBES];
	double self; /* the generator's own worst lateness, seconds */
	size_t sent, answered, first;
} probe;

/* Send and receive NOOPs for as long as `c` has nothing to read, or until `until`. */
static void probe_while_waiting(struct connection *c, double until)
{
	struct pollfd polled[2] = { { .fd = probe.c.fd, .events = POLLIN },
		                    { .fd = c ? c->fd : -1, .events = POLLIN } };

	for (;;) {
		double t = now();
		bool closed;

		if (until > 0 && t >= until)
			return;
		if (t >= probe.next) {
			if (probe.sent == MOST_PROBES)
				die("too long for the probe");
			if (t - probe.next > probe.self)
				probe.self = t - probe.next;
			probe.due[probe.sent++] = probe.next;
			probe.next += 1e-3;
			command(&probe.c, "NOOP\r\n");
			continue;
		}
		double wait = probe.next - t < 1e-3 ? probe.next - t : 1e-3;
		struct timespec rest = { .tv_nsec = (long)(wait * 1e9) };

		ppoll(polled, 2, &rest, NULL);
		if (polled[0].revents && fill(&probe.c, MSG_DONTWAIT, &closed)) {
			t = now();
			while (parse(&probe.c, STATUS, 0)) {
				probe.late[probe.answered] = t - probe.due[probe.answered];
				probe.answered++;
			}
		}
		if (polled[1].revents)
			return;
	}
}

static void await_probing(struct connection *c, enum kind kind)
{
	bool closed;

	while (!parse(c, kind, 0)) {
		probe_while_waiting(c, 0);
		if (!fill(c, 0, &closed))
			die("the server has hung up");
	}
}

static int by_lateness(const void *left, const void *right)
{
	double a = *(const double *)left, b = *(const double *)right;

	return (a > b) - (a < b);
}

/* Waits for the answers of this phase, adds its members to `json`, and begins the next phase. */
static void end_phase(char *json, size_t room, const char *name)
{
	/* No more is sent meanwhile: a server that is always one answer behind would never end it. */
	probe.next = now() + 1e9;
	while (probe.answered < probe.sent)
		probe_while_waiting(NULL, now() + 1e-4);
	size_t count = probe.answered - probe.first, used = strlen(json);
	double *late = probe.late + probe.first;

	qsort(late, count, sizeof *late, by_lateness);
	snprintf(json + used, room - used,
	         ", \"%s_probes\": %zu, \"%s_p99_ms\": %.3f, \"%s_max_ms\": %.3f, "
	         "\"%s_self_ms\": %.3f",
	         name, count, name, count ? late[(count - 1) * 99 / 100] * 1e3 : 0.0, name,
	         count ? late[count - 1] * 1e3 : 0.0, name, probe.self * 1e3);
	probe.first = probe.answered;
	probe.self = 0;
	probe.next = now() + 1e-3;
}

static void open_drop(void)
{
	struct connection c = { 0 };
	char json[1000] = "";

	if (!given.probe_user)
		die("--probe-user is needed");
	dial(&probe.c, SMALL_BUFFER, 0);
	login(&probe.c, given.probe_user);
	probe.next = now();
	probe_while_waiting(NULL, now() + 0.3);
	end_phase(json, sizeof json, "idle");
	ready();
	dial(&c, BUFFER, 0);
	await_probing(&c, STATUS);
	if (given.apop) {
		send_apop(&c, given.user);
	} else {
		send_user(&c, given.user);
		await_probing(&c, STATUS);
		command(&c, "PASS %s\r\n", given.password);
	}
	await_probing(&c, STATUS);
	command(&c, "STAT\r\n");
	await_probing(&c, STATUS);
	double opened = now() - started;

	stat_drop(&c);
	end_phase(json, sizeof json, "open");
	double asked = now();

	command(&c, "UIDL\r\n");
	await_probing(&c, IDS);
	double identified = now() - asked;

	end_phase(json, sizeof json, "uidl");
	check_unique();
	snprintf(json + strlen(json), sizeof json - strlen(json), ", \"uidl_seconds\": %.6f",
	         identified);
	result(message_count, total_octets, opened, json);
	say_quit(&c);
	say_quit(&probe.c);
}

#endif
