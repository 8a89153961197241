/* MD5 of a short text, for APOP digests (RFC 1321; RFC 1939 section 7). */
#ifndef BENCHMARKS_MD5_H
#define BENCHMARKS_MD5_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { MD5_LONGEST = 1023 };

/* One block of 64 octets into the four words of the state (RFC 1321 section 3.4). */
static void md5_block(uint32_t state[4], const unsigned char *block)
{
	/* Rotations of the four rounds, four steps each. */
	static const int turns[4][4] = {
		{ 7, 12, 17, 22 }, { 5, 9, 14, 20 }, { 4, 11, 16, 23 }, { 6, 10, 15, 21 }
	};
	static uint32_t sines[64];
	uint32_t words[16], a = state[0], b = state[1], c = state[2], d = state[3];

	if (!sines[0])
		for (int i = 0; i < 64; i++)
			sines[i] = (uint32_t)(fabs(sin(i + 1.0)) * 4294967296.0);
	for (int i = 0; i < 16; i++)
		words[i] = (uint32_t)block[4 * i] | (uint32_t)block[4 * i + 1] << 8 |
		           (uint32_t)block[4 * i + 2] << 16 | (uint32_t)block[4 * i + 3] << 24;
	for (int i = 0; i < 64; i++) {
		uint32_t mixed, old_b = b;
		int word, turn = turns[i / 16][i % 4];

		switch (i / 16) {
		case 0: mixed = (b & c) | (~b & d); word = i; break;
		case 1: mixed = (b & d) | (c & ~d); word = 5 * i + 1; break;
		case 2: mixed = b ^ c ^ d; word = 3 * i + 5; break;
		default: mixed = c ^ (b | ~d); word = 7 * i; break;
		}
		mixed += a + words[word % 16] + sines[i];
		a = d;
		d = c;
		c = old_b;
		b = old_b + (mixed << turn | mixed >> (32 - turn));
	}
	state[0] += a;
	state[1] += b;
	state[2] += c;
	state[3] += d;
}

/* The digest of `length` octets (at most MD5_LONGEST) as 32 lower-case hexadecimal digits. */
static void md5_hex(const char *text, size_t length, char hex[33])
{
	uint32_t state[4] = { 0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476 };
	unsigned char padded[MD5_LONGEST + 1 + 72] = { 0 };
	size_t blocks = (length + 8) / 64 + 1;
	uint64_t bits = (uint64_t)length * 8;

	memcpy(padded, text, length);
	padded[length] = 0x80;
	for (int i = 0; i < 8; i++)
		padded[blocks * 64 - 8 + i] = (unsigned char)(bits >> (8 * i));
	for (size_t i = 0; i < blocks; i++)
		md5_block(state, padded + 64 * i);
	for (int i = 0; i < 16; i++)
		snprintf(hex + 2 * i, 3, "%02x", state[i / 4] >> (8 * (i % 4)) & 0xff);
}

#endif
