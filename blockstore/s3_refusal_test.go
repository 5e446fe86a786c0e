package blockstore_test

import (
	"errors"
	"io"
	"net/http"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
)

// Half a refusal is none, where its status alone does not say what is refused.
func TestS3RefusalThatBreaksOffIsUnavailable(t *testing.T) {
	for _, status := range []int{http.StatusNotFound, http.StatusBadRequest} {
		s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "1000")
			w.WriteHeader(status)
			io.WriteString(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>NoSuch`)
		})
		for call, err := range callAll(t.Context(), s) {
			if !errors.Is(err, blockstore.ErrUnavailable) || errors.Is(err, blockstore.ErrNotExist) {
				t.Errorf("%d: %s: %v, want ErrUnavailable", status, call, err)
			}
		}
	}
}
