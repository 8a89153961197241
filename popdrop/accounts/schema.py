"""The tables of the accounts database."""

from __future__ import annotations

from typing import Final

from popdrop.sqlitefile import META, Schema

ACCOUNTS: Final = Schema(
    application_id=0x506F7064,  # "Popd"
    title="accounts database",
    remedy="`popdrop user add --db {path} NAME` makes one",
    steps=(
        (
            META,
            "CREATE TABLE account ("
            " name BLOB PRIMARY KEY NOT NULL CHECK (typeof(name) = 'blob'),"
            " disabled INTEGER NOT NULL DEFAULT 0,"
            " version INTEGER NOT NULL,"
            " changed INTEGER NOT NULL"
            ") WITHOUT ROWID",
            "CREATE TABLE verifier ("
            " name BLOB NOT NULL REFERENCES account (name) ON DELETE CASCADE,"
            " kind TEXT NOT NULL,"
            " value BLOB NOT NULL,"
            " PRIMARY KEY (name, kind)"
            ") WITHOUT ROWID",
        ),
        # Restrictions of an account, which a server that does not know them must not overlook.
        (
            "ALTER TABLE account RENAME TO accounts",
            "ALTER TABLE accounts ADD COLUMN expires INTEGER",
            "ALTER TABLE accounts ADD COLUMN networks TEXT NOT NULL DEFAULT ''",
            "ALTER TABLE accounts ADD COLUMN read_only INTEGER NOT NULL DEFAULT 0",
            "CREATE TABLE app_password ("
            " name BLOB NOT NULL REFERENCES accounts (name) ON DELETE CASCADE,"
            " label TEXT NOT NULL,"
            " digest BLOB NOT NULL,"
            " read_only INTEGER NOT NULL,"
            " networks TEXT NOT NULL,"
            " expires INTEGER,"
            " created INTEGER NOT NULL,"
            " used INTEGER,"
            " PRIMARY KEY (name, label)"
            ") WITHOUT ROWID",
        ),
    ),
)
