"""Makes `twistd popdrop` known; imports nothing of Popdrop until it is asked for."""

from twisted.application.service import ServiceMaker

popdrop = ServiceMaker(  # type: ignore[no-untyped-call]
    "Popdrop",
    "popdrop.tap",
    "A POP3 server for mail spools: APOP, TLS, STLS, mbox.",
    "popdrop",
)
