"""The end of a tunnel, in the HTTP/2 of python3-h2: refuses the first streams that it is asked for, and echoes the others.

    tunnel_peer.py CERTIFICATE KEY ROOT HOW

HOW is what becomes of the streams: `refused` resets the first one with REFUSED_STREAM, `always-refused` every one, `goaway`
says with the first one that it goes away and has looked at none, `after-200` takes every one, and resets it with
REFUSED_STREAM when it has read something. Prints a line for each connection and each request.
"""

import socket
import ssl
import sys
import threading

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, StreamEnded

PORT = 15008

certificate, key, root, how = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.load_cert_chain(certificate, key)
context.load_verify_locations(root)
context.verify_mode = ssl.CERT_REQUIRED
context.set_alpn_protocols(["h2"])
lock = threading.Lock()
asked = 0


def say(line):
    with lock:
        print(line, flush=True)


def count():
    global asked
    with lock:
        asked += 1
        return asked


def request(h2, event):
    """Answers a CONNECT. True: the connection is over with it."""
    headers = dict(event.headers)
    number = count()
    say(f"{headers[b':method'].decode()} {headers[b':authority'].decode()}")
    if how == "always-refused" or (how == "refused" and number == 1):
        h2.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)
    elif how == "goaway" and number == 1:
        h2.close_connection(ErrorCodes.NO_ERROR, last_stream_id=0)
        return True
    else:
        h2.send_headers(event.stream_id, [(":status", "200")])
    return False


def serve(tcp):
    tls = context.wrap_socket(tcp, server_side=True)
    say(f"connection {tls.selected_alpn_protocol()}")
    # Debian's version takes a CONNECT without :scheme and :path, which RFC 9113 asks for, for a mistake.
    lenient = H2Configuration(client_side=False, header_encoding=None, validate_inbound_headers=False)
    h2 = H2Connection(lenient)
    h2.initiate_connection()
    over = False
    while not over:
        tls.sendall(h2.data_to_send())
        read = tls.recv(65536)
        if not read:
            break
        for event in h2.receive_data(read):
            if isinstance(event, RequestReceived):
                over = request(h2, event)
            elif isinstance(event, DataReceived):
                h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if how == "after-200":
                    h2.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)
                else:
                    h2.send_data(event.stream_id, event.data)
            elif isinstance(event, StreamEnded) and how != "after-200":
                h2.end_stream(event.stream_id)
    tls.sendall(h2.data_to_send())
    tls.close()


listener = socket.create_server(("", PORT))
say("listening")
while True:
    accepted, _ = listener.accept()
    threading.Thread(target=serve, args=(accepted,), daemon=True).start()
