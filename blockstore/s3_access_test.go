package blockstore_test

import (
	"errors"
	"fmt"
	"net/http"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
)

// S3 answers those who may not list all of a bucket with 403 where there is no
// object. What is not there is found out by a listing of that key, and only so.
func TestS3TellsWhatIsDeniedFromWhatIsNotThere(t *testing.T) {
	const denied = `<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>`
	for name, c := range map[string]struct {
		status int
		listed string
		want   error
	}{
		"absent":           {200, "", blockstore.ErrNotExist},
		"a longer key":     {200, "<Contents><Key>p/key.more</Key></Contents>", blockstore.ErrNotExist},
		"there":            {200, "<Contents><Key>p/key</Key></Contents>", blockstore.ErrDenied},
		"listing denied":   {403, denied, blockstore.ErrDenied},
		"listing fails":    {500, "", blockstore.ErrDenied},
		"listing is waste": {200, "<Contents>", blockstore.ErrDenied},
	} {
		t.Run(name, func(t *testing.T) {
			s := fakeS3(t, func(w http.ResponseWriter, r *http.Request) {
				switch {
				case !r.URL.Query().Has("list-type"):
					w.WriteHeader(http.StatusForbidden)
					fmt.Fprint(w, denied)
				case r.FormValue("prefix") != "p/key":
					t.Errorf("listed %q", r.FormValue("prefix"))
				case c.status != http.StatusOK:
					w.WriteHeader(c.status)
					fmt.Fprint(w, c.listed)
				default:
					fmt.Fprintf(w, "<ListBucketResult>%s</ListBucketResult>", c.listed)
				}
			})
			_, _, err := s.Get(t.Context(), "key", 100)
			for _, verdict := range []error{blockstore.ErrNotExist, blockstore.ErrDenied, blockstore.ErrUnavailable} {
				if errors.Is(err, verdict) != (verdict == c.want) {
					t.Errorf("got %v, want %v", err, c.want)
				}
			}
		})
	}
}

// A store that is no bucket has no versions, and a refusal says nothing.
func TestVersioned(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		body   string
		want   bool
		err    error
	}{
		"never":     {200, `<VersioningConfiguration/>`, false, nil},
		"enabled":   {200, `<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>`, true, nil},
		"suspended": {200, `<VersioningConfiguration><Status>Suspended</Status></VersioningConfiguration>`, false, nil},
		"denied":    {403, `<Error><Code>AccessDenied</Code></Error>`, false, blockstore.ErrDenied},
	} {
		t.Run(name, func(t *testing.T) {
			s := fakeS3(t, func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(c.status)
				fmt.Fprint(w, c.body)
			})
			got, err := blockstore.Versioned(t.Context(), s)
			if got != c.want || !errors.Is(err, c.err) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	if versioned, err := blockstore.Versioned(t.Context(), blockstore.NewMem()); versioned || err != nil {
		t.Errorf("in memory: %v, %v", versioned, err)
	}
}
