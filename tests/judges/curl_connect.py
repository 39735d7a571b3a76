"""Fetches a page through a tunnel with libcurl, as a client of an HTTP/2 proxy that asks for a certificate:
curl_connect.py PYCURL PROXY ROOT CERTIFICATE KEY URL. Prints what became of it as JSON."""

import io
import json
import sys

packages, proxy, root, certificate, key, url = sys.argv[1:]
sys.path.insert(0, packages)

import pycurl

# CURLPROXY_HTTPS2 of curl/curl.h: for this one, pycurl has no name.
HTTPS2 = 3

said = []
page = io.BytesIO()
curl = pycurl.Curl()
for option, value in {
    pycurl.URL: url,
    pycurl.PROXY: proxy,
    pycurl.PROXYTYPE: HTTPS2,
    pycurl.HTTPPROXYTUNNEL: 1,
    pycurl.PROXY_CAINFO: root,
    pycurl.PROXY_SSLCERT: certificate,
    pycurl.PROXY_SSLKEY: key,
    # The certificate has the pod's identity in it, and no host's name.
    pycurl.PROXY_SSL_VERIFYHOST: 0,
    pycurl.TIMEOUT: 40,
    pycurl.VERBOSE: 1,
    pycurl.DEBUGFUNCTION: lambda kind, text: said.append(text.decode(errors="replace")) if kind < 3 else None,
    pycurl.WRITEFUNCTION: page.write,
}.items():
    curl.setopt(option, value)
error = None
try:
    curl.perform()
except pycurl.error as failure:
    error = str(failure)
print(json.dumps({
    "error": error,
    "status": curl.getinfo(pycurl.RESPONSE_CODE),
    "page": page.getvalue().decode(errors="replace"),
    "said": "".join(said),
}))
