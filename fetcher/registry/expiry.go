package registry

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// A registry redirects to object storage by a signed URL, which is valid for some minutes.
// The URL says until when, in a parameter that depends on who signs: S3 and those that
// imitate it, Google, Azure, CloudFront and other CDNs.

const (
	// expiryMargin is how long before its end a location is no longer used, so that a
	// request that is under way arrives in time; at most a tenth of its life.
	expiryMargin = 10 * time.Second
	// maxLife bounds how long a location is used without asking the registry again.
	maxLife = 7 * 24 * time.Hour
)

// lifeOf returns how long a signed URL can be used from now on, where now is the time by the
// clock of the server that checks the signature. known is false if the URL does not say.
func lifeOf(u *url.URL, now time.Time) (life time.Duration, known bool) {
	end, known := expiryOf(u.Query())
	if !known {
		return 0, false
	}
	life = min(end.Sub(now), maxLife)
	return life - min(max(life, 0)/10, expiryMargin), true
}

// clockOf is the time by the clock of the server that answered, or ours if it does not say.
func clockOf(resp *http.Response) time.Time {
	if t, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		return t.Add(time.Second) // the header has whole seconds, rounded down
	}
	return time.Now()
}

// expiryOf reads until when a signed URL is valid. The earliest time counts if there are
// several.
func expiryOf(query url.Values) (end time.Time, known bool) {
	add := func(t time.Time) {
		if !known || t.Before(end) {
			end, known = t, true
		}
	}
	q := make(map[string]string, len(query))
	for name, values := range query {
		q[strings.ToLower(name)] = values[0]
	}
	// Signatures of version 4 have a date and a number of seconds.
	for _, vendor := range []string{"amz", "goog", "oss", "obs", "cos", "bce", "tos"} {
		begin, err := time.Parse("20060102T150405Z", q["x-"+vendor+"-date"])
		if s, ok := seconds(q["x-"+vendor+"-expires"]); ok && err == nil {
			add(begin.Add(s))
		}
	}
	// Version 2 of S3 and Google, CloudFront and Google's CDN have a Unix time, but only a
	// signature gives the parameter this meaning.
	for _, name := range []string{"signature", "key-pair-id", "keyname", "ossaccesskeyid", "awsaccesskeyid", "googleaccessid"} {
		if _, signed := q[name]; signed {
			if t, ok := unixTime(q["expires"]); ok {
				add(t)
			}
			break
		}
	}
	// A shared access signature of Azure, whose start and end are dates.
	if q["sig"] != "" {
		for _, layout := range []string{time.RFC3339, "2006-01-02T15:04Z07:00", "2006-01-02"} {
			if t, err := time.Parse(layout, q["se"]); err == nil {
				add(t)
				break
			}
		}
	}
	// Tencent: begin;end.
	if _, to, ok := strings.Cut(q["q-sign-time"], ";"); ok {
		if t, ok := unixTime(to); ok {
			add(t)
		}
	}
	// A custom policy of CloudFront.
	if t, ok := policyEnd(q["policy"]); ok {
		add(t)
	}
	return end, known
}

func seconds(s string) (time.Duration, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return time.Duration(n) * time.Second, err == nil
}

// unixTime reads seconds since 1970, up to the year 9999.
func unixTime(s string) (time.Time, bool) {
	n, err := strconv.ParseUint(s, 10, 38)
	if err != nil || n > 253402300799 {
		return time.Time{}, false
	}
	return time.Unix(int64(n), 0), true
}

// policyEnd reads the end of a CloudFront policy: JSON in base64, with characters replaced
// that a URL cannot have.
func policyEnd(s string) (time.Time, bool) {
	if s == "" || len(s) > 8<<10 {
		return time.Time{}, false
	}
	s = strings.NewReplacer("-", "+", "_", "=", "~", "/").Replace(s)
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		return time.Time{}, false
	}
	var policy struct {
		Statement []struct {
			Condition struct {
				DateLessThan struct {
					Time json.Number `json:"AWS:EpochTime"`
				}
			}
		}
	}
	if json.Unmarshal(b, &policy) != nil || len(policy.Statement) == 0 {
		return time.Time{}, false
	}
	return unixTime(policy.Statement[0].Condition.DateLessThan.Time.String())
}
