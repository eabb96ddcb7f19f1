// Command fanout measures starts of one image on many devices and many hosts at once: how long
// they take, and what they read from the registry. The measure is read amplification: bytes that
// the registry sends, divided by the bytes of the distinct chunks that are needed.
//
//	go run ./bench/fanout -images DIR                       all parts
//	go run ./bench/fanout -images DIR -parts host,hosts     some of them
//	go run ./bench/fanout -parts simulate -plots PLOTS      no images, no root
//
// DIR has OCI layouts by scripts/workloads. The parts:
//
//	host      100 devices of one image on one host, and 50 images that share all layers but one
//	hosts     8 hosts, 20 starts on each: with a zone, without one, behind docker-registry as a
//	          pull-through cache
//	peer      what a chunk from a peer takes, on two idle hosts
//	faults    the same with a zone, and a host of it that is added, killed, lost, partitioned from
//	          the others, slow by ten times, or lying; and with a zone that is partitioned in
//	          halves
//	agree     one start on each host, and the simulator with the same links
//	simulate  1,000 and 10,000 hosts in the simulator, package sim
//
// A start opens the export over NBD and reads what the trace of a real start lists, in its order
// and with its time between the reads. All that is read is compared with what the registry has:
// an error of a reader, or a wrong byte, fails the benchmark.
//
// The parts hosts, peer, faults and agree run thaw serve in network namespaces. Each has a link to one
// switch whose rate tbf limits (network.go). The registry is behind a [bench.Link] on the switch,
// which counts what it carries. Peers speak mutual TLS, with certificates made here. A host is
// told which image to start after it is a member of the zone, so nothing is prefetched before the
// clock runs. Uploads are what left a host's interface, headers and acknowledgements included.
package main
