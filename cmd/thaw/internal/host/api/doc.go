// Package api is the control API of a running server: HTTP and JSON over a unix socket
// in the cache directory, which only the user of the server can connect to.
//
//	curl --unix-socket /var/cache/thaw/control.sock http://thaw/v1/status
//
// A [Server] answers for a [host.Host], and a [Client] asks. openapi.yaml describes each
// request and answer; the server gives it at /v1/openapi.yaml. Sizes are in bytes, times
// as in RFC 3339, durations in seconds. An answer that is no success has the body
// {"error": "..."}.
//
// The server bounds what its clients can take: the connections of all and of each
// process, requests that wait, the length of headers and bodies, and the time in which
// they must arrive. When there are too many connections, it closes the oldest that waits
// for its client, of the process that has the most. So a client that hangs, or that
// connects again and again, costs the others nothing.
//
//	server.go      Server: the socket, its start and its end
//	handler.go     routes, bodies, errors
//	handlers.go    what each route does; nodes.go: those of nodes; zone.go: that of the zone
//	conns.go       bounds on connections and requests
//	client.go      Client
package api
