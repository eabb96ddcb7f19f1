package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// timeline is what the link has carried at which time, in one start. As a line:
//
//	Timeline/image=flask/link=slow/row=thaw ready-ns 61234567 … answer-ns 812345678 step-ns 5000000 down-B 0 0 1448 …
//
// The numbers at the end are the bytes of each step.
type timeline struct {
	image, link, row string
	marks            []mark
	answer           time.Duration
	step             time.Duration
	down             []int64 // bytes received by the end of each step
}

const timelinePrefix = "Timeline/"

// timeline returns the timeline of a clock that was stopped.
func (c *clock) timeline(image, link, row string) *timeline {
	n := min(len(c.down), int(c.end/step))
	return &timeline{image, link, row, c.marks, c.end, step, append(c.down[:n:n], c.used.Down)}
}

func (t *timeline) name() string { return startName(t.image, t.link, t.row) }

func (t *timeline) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%simage=%s/link=%s/row=%s", timelinePrefix, t.image, t.link, t.row)
	for _, m := range t.marks {
		fmt.Fprintf(&b, " %s-ns %d", m.name, m.at.Nanoseconds())
	}
	fmt.Fprintf(&b, " answer-ns %d step-ns %d down-B", t.answer.Nanoseconds(), t.step.Nanoseconds())
	var before int64
	for _, n := range t.down {
		fmt.Fprintf(&b, " %d", n-before)
		before = n
	}
	return b.String()
}

func parseTimeline(line string) (*timeline, error) {
	fields := strings.Fields(line)
	bad := func(what string) error { return fmt.Errorf("timeline of %s: %s", fields[0], what) }
	t := &timeline{image: part(fields[0], "image"), link: part(fields[0], "link"), row: part(fields[0], "row")}
	for fields, rest := fields[1:], true; rest; fields = fields[2:] {
		if len(fields) < 2 {
			return nil, bad("it ends early")
		}
		if fields[0] == "down-B" {
			var sum int64
			for _, f := range fields[1:] {
				n, err := strconv.ParseInt(f, 10, 64)
				if err != nil || n < 0 {
					return nil, bad("bytes " + f)
				}
				sum += n
				t.down = append(t.down, sum)
			}
			break
		}
		n, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil || n < 0 {
			return nil, bad(fields[0] + " " + fields[1])
		}
		switch d := time.Duration(n); fields[0] {
		case "answer-ns":
			t.answer = d
		case "step-ns":
			t.step = d
		default:
			t.marks = append(t.marks, mark{strings.TrimSuffix(fields[0], "-ns"), d})
		}
	}
	if t.step <= 0 || t.answer <= 0 {
		return nil, bad("it has no step or no answer")
	}
	return t, nil
}

// bytes returns how many bytes were received.
func (t *timeline) bytes() int64 {
	if len(t.down) == 0 {
		return 0
	}
	return t.down[len(t.down)-1]
}

// by returns the time at which that part of all bytes had been received.
func (t *timeline) by(part float64) time.Duration {
	for i, n := range t.down {
		if float64(n) >= part*float64(t.bytes()) {
			return min(time.Duration(i+1)*t.step, t.answer)
		}
	}
	return t.answer
}

// at returns how many bytes had been received at that time.
func (t *timeline) at(d time.Duration) int64 {
	i := int(d/t.step) - 1
	if i < 0 || len(t.down) == 0 {
		return 0
	}
	return t.down[min(i, len(t.down)-1)]
}

// busy returns which part of the line's capacity was used until then.
func (t *timeline) busy(rate int64, until time.Duration) float64 {
	return float64(t.at(until)) * 8 / (float64(rate) * until.Seconds())
}
