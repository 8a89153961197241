# Writes down all that it was given, into the file of its first argument, and lets everybody in.
import json
import os
import sys

listed = sorted(map(int, os.listdir("/proc/self/fd")))
seen = {
    "arguments": sys.argv[2:],
    "environ": dict(os.environ),
    # The one that lists the folder is gone when it is looked at again.
    "descriptors": [n for n in listed if os.path.exists(f"/proc/self/fd/{n}")],
    "0": os.readlink("/proc/self/fd/0"),
    "leads": os.getpid() == os.getpgid(0) == os.getsid(0),
}
given = b""
while octets := os.read(3, 4096):
    given += octets
os.close(3)
seen["given"] = given.decode("latin-1")
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(seen) + "\n")
os.execv(sys.argv[2], sys.argv[2:])
