// Package sim simulates the starts of one image on thousands of hosts: what they read from
// the registry, from each other, and how long they take. The decisions are those of a real
// zone: each simulated host has a [zone.Router] and a [zone.Grants]. The hosts, their links
// and the registry are simulated, over virtual time. The same options give the same result.
//
//	r, err := sim.Run(ctx, sim.Options{Plan: sim.Flask(), Hosts: 10_000, System: sim.Zone})
//	fmt.Println(r.Percentile(0.99), r.Amplification())
//
// # Time
//
// A queue orders events by time, and by the order in which they were made (queue.go). There
// are no goroutines, no clock but the queue's, and one seeded source of random numbers.
//
// # Network
//
// Each host has a link with an uplink and a downlink (net.go). A link sends pieces of at most
// 64 KiB, one at a time. The flows that share an uplink take turns, piece by piece, so each
// gets a fair share. The downlink takes pieces in the order in which they come. A sender has
// at most a window of bytes of a flow on the way, as TCP does; so where the downlink is the
// bottleneck, the sender's uplink is free for others. [bench.Link] forwards pieces in the
// same way, which is why the simulator can be compared with processes behind such links.
// Exact max-min fairness would take a pass over all flows of the network per event: with
// 10,000 hosts that is hours instead of seconds. The flows differ from it by a piece.
//
// A lost packet delays its piece and what follows it in the flow by a round trip, and a lost
// packet at the end of an answer by the least retransmission timeout, 200 ms.
//
// # Hosts
//
// A host opens the image: it reads the manifest and the list of what is beside the image from the
// registry, and the index from there or through the zone. Then it reads what a recorded start reads, with that start's time between
// the reads (plan.go). It fetches as package fetcher does (host.go): a chunk once; demands before prefetches; neighbours in one request;
// prefetches in the order of the plan within a window of bytes; and while a demand arrives,
// the prefetches are not read, so their senders stop. What has arrived may wait for a processor
// (processor.go); without [Processors], hosts are infinitely fast.
//
// # Systems
//
// Zone is thaw's (zone.go). Its hosts send a chunk as the registry has it if they have it so in
// memory, which is bounded, and else uncompressed. Registry reads everything from the registry;
// PullThrough from one cache with a faster line, which reads each chunk once; Tree from a parent
// in a balanced binary tree, as FaaSNet's function trees (others.go).
package sim
