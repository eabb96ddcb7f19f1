package api

import (
	"context"
	_ "embed"
	"errors"
	"net/http"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"thaw/cmd/thaw/internal/host"
)

// addTimeout bounds the opening of a device that is added.
const addTimeout = 2 * time.Minute

// drainTimeout is how long a removal waits for the last client of a device, and
// closeTimeout how long it waits for a device without clients: its recording may have to
// be stored.
const (
	drainTimeout = time.Second
	closeTimeout = 30 * time.Second
	stopsTimeout = 20 * time.Second // for the files of recordings
)

// maxDevices bounds how many devices there may be when one is added. maxName bounds its
// names, in bytes, as NBD does.
const (
	maxDevices = 1024
	maxName    = 4096
)

//go:embed openapi.yaml
var openAPI []byte

func (s *Server) routes() []route {
	return append([]route{
		{s, "GET", "/v1/status", false, s.status},
		{s, "GET", "/v1/devices", false, s.devices},
		{s, "POST", "/v1/devices", true, s.add},
		{s, "GET", "/v1/devices/{id}", false, s.device},
		{s, "DELETE", "/v1/devices/{id}", true, s.remove},
		{s, "POST", "/v1/devices/{id}/commit", true, s.commit},
		{s, "POST", "/v1/traces/stop", true, s.stopTraces},
		{s, "GET", "/v1/zone", true, s.zone},
		{s, "GET", "/v1/openapi.yaml", false, func(*http.Request, []byte) (response, error) { return response{body: openAPI}, nil }},
	}, s.nodeRoutes()...)
}

func (s *Server) status(*http.Request, []byte) (response, error) {
	st := s.host.Status()
	st.Version = s.version
	return response{body: st}, nil
}

// Devices is the list of devices.
type Devices struct {
	Devices []host.DeviceInfo `json:"devices"`
}

func (s *Server) devices(*http.Request, []byte) (response, error) {
	list := Devices{[]host.DeviceInfo{}}
	for _, d := range s.host.Devices() {
		list.Devices = append(list.Devices, d.Info())
	}
	return response{body: list}, nil
}

func (s *Server) device(r *http.Request, _ []byte) (response, error) {
	d, err := s.find(r.PathValue("id"))
	if err != nil {
		return response{}, err
	}
	return response{body: d.Info()}, nil
}

func (s *Server) find(id string) (*host.Device, error) {
	d := s.host.Device(id)
	if d == nil {
		return nil, fail(http.StatusNotFound, "there is no device %.100q", id)
	}
	return d, nil
}

// NewDevice asks for a device.
type NewDevice struct {
	Name  string `json:"name,omitempty"` // by which clients open it; the image's if empty
	Image string `json:"image"`
}

func (s *Server) add(r *http.Request, body []byte) (response, error) {
	var n NewDevice
	if err := decode(body, &n); err != nil {
		return response{}, err
	}
	if n.Image == "" {
		return response{}, fail(http.StatusBadRequest, "image is missing: the reference of the image to open")
	}
	if n.Name == "" {
		n.Name = n.Image
	}
	for field, v := range map[string]string{"name": n.Name, "image": n.Image} {
		if len(v) > maxName || !utf8.ValidString(v) || strings.ContainsFunc(v, func(c rune) bool { return !unicode.IsPrint(c) }) {
			return response{}, fail(http.StatusBadRequest, "%s %.100q: it must be at most %d bytes of printable text", field, v, maxName)
		}
	}
	if len(s.host.Devices()) >= maxDevices {
		return response{}, fail(http.StatusConflict, "there are %d devices, the most that a server takes: remove some", maxDevices)
	}
	ctx, cancel := context.WithTimeout(r.Context(), s.bounds.add)
	defer cancel()
	added, err := s.host.Add(ctx, host.Spec{Name: n.Name, Image: n.Image, Keep: true})
	if err != nil {
		return response{}, err
	}
	return response{code: http.StatusCreated, location: "/v1/devices/" + added[0].ID(), body: added[0].Info()}, nil
}

// remove removes a device that no client has open. With ?drain=true, a device that
// clients have open is closed when the last one leaves.
func (s *Server) remove(r *http.Request, _ []byte) (response, error) {
	d, err := s.find(r.PathValue("id"))
	if err != nil {
		return response{}, err
	}
	do, timeout := s.host.RemoveUnused, closeTimeout
	switch drain := r.URL.Query().Get("drain"); drain {
	case "true":
		do, timeout = s.host.Remove, drainTimeout
	case "", "false":
	default:
		return response{}, fail(http.StatusBadRequest, "drain=%.20q: it must be true or false", drain)
	}
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	switch err := do(ctx, d.ID()); {
	case err == nil:
		return response{code: http.StatusNoContent}, nil
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return response{code: http.StatusAccepted, body: d.Info()}, nil
	default:
		return response{}, err
	}
}

// StopTraces asks for the end of recordings.
type StopTraces struct {
	Device string `json:"device,omitempty"` // its ID; empty: those of all devices
}

// StoppedTraces says how many recordings have ended.
type StoppedTraces struct {
	Stopped int `json:"stopped"`
}

func (s *Server) stopTraces(r *http.Request, body []byte) (response, error) {
	var q StopTraces
	if len(body) > 0 {
		if err := decode(body, &q); err != nil {
			return response{}, err
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), stopsTimeout)
	defer cancel()
	if q.Device == "" {
		return response{body: StoppedTraces{s.host.StopRecordings(ctx)}}, nil
	}
	d, err := s.find(q.Device)
	if err != nil {
		return response{}, err
	}
	var n StoppedTraces
	if d.StopRecording(ctx) {
		n.Stopped = 1
	}
	return response{body: n}, nil
}
