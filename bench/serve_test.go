package bench

import "testing"

func TestParseServed(t *testing.T) {
	log := `{"level":"INFO","msg":"fetched","requests":1}
{"level":"INFO","msg":"stopped","fetched_bytes":11287636,"fetched_chunks":240,"requests":238,"images_stored_bytes":81083152,"wrong_chunks":1}
not JSON at all`
	d, err := parseServed([]byte(log))
	if err != nil || d.FetchedBytes != 11287636 || d.Requests != 238 || d.Chunks != 240 || d.StoredBytes != 81083152 || d.WrongChunks != 1 {
		t.Errorf("%+v, %v", d, err)
	}
	if _, err := parseServed([]byte(`{"msg":"ready","requests":238}`)); err == nil {
		t.Error("a log without a summary is accepted")
	}
}
