# qmail-authuser's two ways for POP3: the first argument is a file of lines name:password, the rest
# is run. The password on descriptor 3 is itself, or an APOP digest of it with the timestamp.
import hashlib
import os
import sys

given = b""
while octets := os.read(3, 513):
    given += octets
os.close(3)
name, password, timestamp, rest = given.split(b"\0")
if rest or len(given) > 512:
    sys.exit(2)
try:
    with open(sys.argv[1], "rb") as users:
        lines = users.read().splitlines()
except OSError:
    sys.exit(111)
secret = dict(line.split(b":", 1) for line in lines).get(name)
if secret is None:
    sys.exit(1)
if password not in (secret, hashlib.md5(timestamp + secret).hexdigest().encode()):
    sys.exit(1)
if os.geteuid() == 0:  # as the user of virtual users
    os.setgroups([])
    os.setgid(1234)
    os.setuid(1234)
os.environ["USER"] = name.decode()
os.execv(sys.argv[2], sys.argv[2:])
