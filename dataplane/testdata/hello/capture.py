#!/usr/bin/env python3
"""Captures the ClientHellos of this directory from real clients, over loopback.

    capture.py [NAME...]        all clients, or those named

Each client connects to a listener of this script, which keeps what comes until the hello is whole, writes it to NAME.bin and closes
the connection; so the client's handshake fails, which is expected. What each client needs is in README.md.
"""

import pathlib
import socket
import subprocess
import sys
import threading

HERE = pathlib.Path(__file__).parent
SERVER_NAME = "blog.example.com"
SECONDS = 20


def command(*words):
    """A client that is a program; {port} and {name} are filled in."""

    def connect(port):
        subprocess.run(
            [word.format(port=port, name=SERVER_NAME) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )

    return connect


def browser(profile):
    """curl_cffi, which sends the hello of a browser's TLS library with that browser's settings."""

    def connect(port):
        import curl_cffi

        try:
            curl_cffi.get(
                f"https://{SERVER_NAME}:{port}/",
                impersonate=profile,
                timeout=SECONDS,
                curl_options={curl_cffi.CurlOpt.RESOLVE: [f"{SERVER_NAME}:{port}:127.0.0.1"]},
            )
        except curl_cffi.exceptions.RequestException:
            pass

    return connect


def tlslite_all_key_shares(port):
    from tlslite.api import HandshakeSettings, TLSConnection
    from tlslite.errors import TLSError

    settings = HandshakeSettings()
    settings.keyShares = settings.eccCurves + settings.dhGroups
    connection = TLSConnection(socket.create_connection(("127.0.0.1", port), SECONDS))
    try:
        connection.handshakeClientCert(
            serverName=SERVER_NAME, alpn=[b"h2", b"http/1.1"], settings=settings
        )
    except (TLSError, OSError):
        pass
    finally:
        connection.sock.close()


OPENSSL = ("openssl", "s_client", "-connect", "127.0.0.1:{port}")
CLIENTS = {
    "openssl": command(*OPENSSL, "-servername", "{name}"),
    "openssl-alpn": command(*OPENSSL, "-servername", "{name}", "-alpn", "h2,http/1.1"),
    "openssl-noservername": command(*OPENSSL, "-noservername"),
    "openssl-tls12": command(*OPENSSL, "-servername", "{name}", "-tls1_2"),
    "gnutls": command(
        "gnutls-cli", "--port={port}", "--sni-hostname={name}", "--alpn=h2", "--alpn=http/1.1", "--insecure", "127.0.0.1"
    ),
    "nss": command("tstclnt", "-4", "-D", "-Q", "-o", "-h", "127.0.0.1", "-p", "{port}", "-a", "{name}"),
    "chrome110": browser("chrome110"),
    "chrome120": browser("chrome120"),
    "chrome131": browser("chrome131"),
    "firefox147": browser("firefox147"),
    "safari260": browser("safari260"),
    "tlslite-all-key-shares": tlslite_all_key_shares,
}


def receive_hello(connection):
    """The first record, which holds the whole hello: no client of ours cuts it."""
    got = b""
    while len(got) < 5 or len(got) < 5 + int.from_bytes(got[3:5], "big"):
        more = connection.recv(65536)
        if not more:
            sys.exit(f"closed after {len(got)} bytes")
        got += more
    record = 5 + int.from_bytes(got[3:5], "big")
    message = 4 + int.from_bytes(got[6:9], "big")
    if got[0] != 22 or got[5] != 1 or record != 5 + message or len(got) != record:
        sys.exit(f"not one hello in one record: {got[:9].hex()} and {len(got)} bytes")
    return got


def capture(connect):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        client = threading.Thread(target=connect, args=(listener.getsockname()[1],))
        client.start()
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(SECONDS)
            hello = receive_hello(connection)
        # Some clients try again with an older version, or by another address.
        listener.close()
        client.join()
    return hello


def main():
    names = sys.argv[1:] or list(CLIENTS)
    for name in names:
        hello = capture(CLIENTS[name])
        (HERE / f"{name}.bin").write_bytes(hello)
        print(f"{name}: {len(hello)} bytes")


if __name__ == "__main__":
    main()
