// SPDX-License-Identifier: Apache-2.0

package hooks

import (
	"errors"
	"io"
	"maps"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-gatehouse/gatehouse/internal/phase"
)

// maxSwallowed bounds the bytes of an origin's answer that are read and thrown
// away when a page takes its place, so that the connection can be kept.
const maxSwallowed = 64 << 10

// statusClientClosed is what reverse_proxy writes when the request was canceled.
const statusClientClosed = 499

// errHeld is what a write gets when the response will not be sent. Only this
// package sees it.
var errHeld = errors.New("the response is held back")

// responseWriter is between the handlers behind and the client. It knows
// whether the header is out, runs the Response hooks, and holds back what a
// refusal or a page replaces.
type responseWriter struct {
	caddyhttp.ResponseWriterWrapper

	x      *phase.Exchange
	table  *phase.Table
	origin []originPager

	wroteHeader bool
	status      int
	bytes       int64

	// the header fields before the handlers behind, where Response hooks may refuse
	before http.Header

	held      bool  // nothing passes anymore; the header is still ours
	refused   error // by a Response hook
	page      *Page // that replaces the origin's answer
	origStat  int   // of that answer
	swallowed int
	answering bool // it is us who answer: no page replaces a page
}

// originPager is a hook that replaces answers of the origin.
type originPager interface {
	originPage(x *phase.Exchange, status int) *Page
}

// WriteHeader sends the header, unless it is to be held back.
func (w *responseWriter) WriteHeader(status int) {
	if status >= 100 && status < 200 && status != http.StatusSwitchingProtocols {
		w.ResponseWriter.WriteHeader(status)
		return
	}
	if w.wroteHeader || w.held {
		return
	}
	if status == statusClientClosed && w.x.Refusal() != nil {
		w.hold()
		return
	}
	if !w.answering {
		for _, o := range w.origin {
			if p := o.originPage(w.x, status); p != nil {
				w.page, w.origStat, w.held = p, status, true
				return
			}
		}
	}
	if len(w.table.Response) > 0 {
		res := phase.Response{Status: status, Header: w.Header()}
		for i := range w.table.Response {
			if err := w.table.Response[len(w.table.Response)-1-i].Response(w.x, &res); err != nil {
				w.refused = err
				w.hold()
				return
			}
		}
		status = res.Status
	}
	w.wroteHeader, w.status = true, status
	w.ResponseWriter.WriteHeader(status)
}

// hold keeps the response back and forgets the fields that it had set.
func (w *responseWriter) hold() {
	w.held = true
	if w.before != nil {
		h := w.Header()
		clear(h)
		maps.Copy(h, w.before)
	}
}

// release lets a response of ours pass after another one was held back.
func (w *responseWriter) release() { w.held, w.answering = false, true }

// Write sends a part of the body.
func (w *responseWriter) Write(p []byte) (int, error) {
	if !w.wroteHeader {
		w.WriteHeader(http.StatusOK)
	}
	if w.held {
		return w.swallow(len(p))
	}
	n, err := w.ResponseWriter.Write(p)
	w.bytes += int64(n)
	return n, err
}

func (w *responseWriter) swallow(n int) (int, error) {
	if w.page == nil || w.swallowed+n > maxSwallowed {
		return 0, errHeld
	}
	w.swallowed += n
	return n, nil
}

// ReadFrom sends what r holds, by the means of the writer below.
func (w *responseWriter) ReadFrom(r io.Reader) (int64, error) {
	if !w.wroteHeader {
		w.WriteHeader(http.StatusOK)
	}
	if w.held {
		return io.Copy(struct{ io.Writer }{w}, r)
	}
	n, err := w.ResponseWriterWrapper.ReadFrom(r)
	w.bytes += n
	return n, err
}

// FlushError sends what is waiting below; nothing while the response is held back.
func (w *responseWriter) FlushError() error {
	if !w.wroteHeader {
		w.WriteHeader(http.StatusOK)
	}
	if w.held {
		return nil
	}
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Interface guards
var (
	_ http.ResponseWriter                       = (*responseWriter)(nil)
	_ io.ReaderFrom                             = (*responseWriter)(nil)
	_ interface{ FlushError() error }           = (*responseWriter)(nil)
	_ interface{ Unwrap() http.ResponseWriter } = (*responseWriter)(nil)
)
