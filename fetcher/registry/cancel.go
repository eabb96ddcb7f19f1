package registry

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// cancelTime is the default of Options.CancelTime.
const cancelTime = 2 * time.Second

// cancelling are the uploads that a client cancels in the background: whoever gave
// an upload up does not wait for a registry that may not answer.
type cancelling struct {
	ctx  context.Context // ends with the client
	end  context.CancelFunc
	time time.Duration // for each
	wg   sync.WaitGroup
}

// start runs cancel, with a context that ends after its time or with the client.
func (c *cancelling) start(cancel func(ctx context.Context)) {
	c.wg.Go(func() {
		ctx, end := context.WithTimeout(c.ctx, c.time)
		defer end()
		cancel(ctx)
	})
}

// FinishUploads waits until the uploads that failed or were ended are cancelled at
// their registries, or the time for that is over. It is for the end of a command:
// Close gives up on them.
func (c *Client) FinishUploads() { c.cancelling.wg.Wait() }

// begin opens an upload. If ctx ends meanwhile, the upload is cancelled once its
// name is known.
func (e *endpoint) begin(ctx context.Context) (*uploading, error) {
	type answer struct {
		u   *uploading
		err error
	}
	answered := make(chan answer, 1)
	late, end := context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		u, err := e.post(late)
		answered <- answer{u, err}
	}()
	select {
	case a := <-answered:
		end()
		return a.u, a.err
	case <-ctx.Done():
	}
	e.client.cancelling.start(func(ctx context.Context) {
		defer end()
		stop := context.AfterFunc(ctx, end)
		defer stop()
		if a := <-answered; a.err == nil {
			a.u.delete(ctx)
		}
	})
	return nil, fmt.Errorf("POST %s: %w", redact(e.url("blobs", "uploads/")), ctx.Err())
}

// cancel tells the registry that the upload, which has failed, will not go on, so
// that the registry can remove the bytes that it has.
func (u *uploading) cancel() { u.e.client.cancelling.start(u.delete) }

// delete asks the registry to remove the upload. One that refuses removes it in its
// own time.
func (u *uploading) delete(ctx context.Context) {
	if resp, err := u.e.do(ctx, request{method: http.MethodDelete, url: u.at, push: true}); err == nil {
		discard(resp)
	}
}
